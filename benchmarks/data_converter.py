"""The converter's part of benchmarks/data.py: photos to shards, beside a loop around webdataset.TarWriter."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from turns import Interleaved, ratio

from data_tools.check import Reencoding, image_facts
from data_tools.convert import convert
from data_tools.formats import Record
from data_tools.parts import Settings
from data_tools.writer import write_index
from dsmoe_vl.data.shards.index import SCHEMA_VERSION


def tar_writer_loop(found: list[Record], output: Path, per_shard: int, is_checked: bool) -> int:
    """A loop around webdataset.TarWriter that writes what the converter writes; `is_checked`: looks at the photos."""
    import webdataset  # with PyTorch, which the converter's processes, which read this file anew, do not need

    rows: list[dict[str, Any]] = []
    for first in range(0, len(found), per_shard):
        path = output / f"train-{first // per_shard:05}.tar"
        with webdataset.TarWriter(str(path), mtime=0, encoder=False) as tar:
            for record in found[first : first + per_shard]:
                assert record.media is not None
                data = record.media.read_bytes()
                facts: dict[str, Any] = image_facts(data, Reencoding())[2] if is_checked else {}
                meta = {"schema_version": SCHEMA_VERSION, "split": "train", "source": "photos", "id": record.identifier,
                        "captions": record.captions, "tasks": ["caption", "retrieval"],
                        "sha256": hashlib.sha256(data).hexdigest(), **facts}  # fmt: skip
                line = json.dumps(meta, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
                tar.write({"__key__": record.identifier, "jpg": data, "txt": record.captions[0].encode(), "json": line})
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = len(found[first : first + per_shard])
        rows.append({"name": path.name, "samples": size, "bytes": path.stat().st_size, "sha256": digest})
    write_index(output, "train", rows)
    return len(found)


def time_converter(found: list[Record], workers: int, run: Interleaved) -> dict[str, float]:
    """Both write the same bytes; the converter starts its processes within the time."""
    per_shard = -(-len(found) // (4 * workers))

    def in_folder(write: Callable[[Path], object], _samples: int) -> int:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "shards")
        return len(found)

    def loop(is_checked: bool, output: Path) -> None:
        output.mkdir()
        tar_writer_loop(found, output, per_shard, is_checked)

    def ours(output: Path) -> None:
        convert(found, output, Settings("photos", samples_per_shard=per_shard), workers=workers)

    print(f"converter, {workers} workers, {len(found)} photos in shards of {per_shard}:")
    rates = run.run(
        {
            "converter": partial(in_folder, ours),
            "TarWriter loop": partial(in_folder, partial(loop, True)),
            "TarWriter loop that looks at no photo": partial(in_folder, partial(loop, False)),
        },
        len(found),
    )
    return {"converter_over_loop": ratio("converter / TarWriter loop", rates["converter"], rates["TarWriter loop"])}
