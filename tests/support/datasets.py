"""Raw datasets for the tests of converters."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from data_tools.formats import Record
from data_tools.synthetic.films import encode_mp4


def read(module: ModuleType, *options: object) -> list[Record]:
    """The records of a format module, its options given as on the command line."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return list(module.records(parser.parse_args([str(option) for option in options])))


def photo(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    """Write a small JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, "JPEG")
    path.write_bytes(file.getvalue())
    return path


def clip(path: Path, frames: int = 8) -> Path:
    """Write a small MP4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_mp4([Image.effect_noise((64, 48), 50).convert("RGB") for _ in range(frames)]))
    return path


def written(path: Path, content: Any) -> Path:
    """Write a text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def problems(records: list[Record]) -> dict[str, str]:
    """The reasons of the records that annotations alone make unusable, by identifier."""
    return {record.identifier: record.problem.partition(":")[0] for record in records if record.problem}
