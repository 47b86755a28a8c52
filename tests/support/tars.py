"""Small tars and pictures for the tests of the data pipeline."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

Member = tuple[str, bytes]


def write_tar(path: Path, members: list[Member], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_index(folder: Path, samples: dict[str, int], **overrides: object) -> Path:
    """An index.json over existing tars, `samples` by shard name."""
    rows = [
        {"name": name, "samples": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, count in samples.items()
        for data in [(folder / name).read_bytes()]
    ]
    content = {"schema_version": 1, "split": "train", "shards": rows} | overrides
    (folder / "index.json").write_text(json.dumps(content))
    return folder / "index.json"


def write_shards(folder: Path, counts: list[int], media: bytes = b"not decoded") -> Path:
    """Shards of `counts` samples with an index; keys are "NAME-SHARD-SAMPLE", NAME being the folder's."""
    samples = {}
    for shard, count in enumerate(counts):
        keys = [f"{folder.name}-{shard}-{i}" for i in range(count)]
        members = [
            member for key in keys for member in ((f"{key}.jpg", media), (f"{key}.txt", f"caption of {key}".encode()))
        ]
        write_tar(folder / f"{shard:05d}.tar", members)
        samples[f"{shard:05d}.tar"] = count
    write_index(folder, samples)
    return folder


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A smooth RGB gradient."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def encoded_as(image: Image.Image, file_format: str, **options: object) -> bytes:
    """The file that Pillow writes for `image`."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
