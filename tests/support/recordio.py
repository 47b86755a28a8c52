"""Writes MXNet's RecordIO from its description, to compare what reads it with; and finds MXNet itself."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

MAGIC = struct.pack("<I", 0xCED7230A)
PYTHON = "DSMOE_VL_MXNET_PYTHON"  # an interpreter that has mxnet and gluoncv, which need numpy 1.19


def record(payload: bytes, number: int = 0, labels: float | Sequence[float] = 0.0) -> bytes:
    """A record of an image with its header."""
    many = () if isinstance(labels, float) else tuple(labels)
    head = struct.pack("<IfQQ", len(many), 0.0 if many else labels, number, 0) + struct.pack(f"<{len(many)}f", *many)
    return parts(head + payload)


def parts(data: bytes) -> bytes:
    """The parts of a record: it is cut where it has the magic number at a multiple of four."""
    cuts = [place for place in range(0, len(data) - 3, 4) if data[place : place + 4] == MAGIC]
    pieces = [data[begin:end] for begin, end in zip([0, *(cut + 4 for cut in cuts)], [*cuts, len(data)], strict=True)]
    kinds = [0] if len(pieces) == 1 else [1, *[2] * (len(pieces) - 2), 3]
    return b"".join(
        MAGIC + struct.pack("<I", kind << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
        for kind, piece in zip(kinds, pieces, strict=True)
    )


def write_records(path: Path, images: Sequence[bytes], with_index: bool = True) -> Path:
    """A .rec file of images with the keys 10, 11, ..., and its .idx file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found, places = b"", []
    for number, image in enumerate(images, 10):
        places.append(f"{number}\t{len(found)}\n")
        found += record(image, number, float(number % 3) if number % 2 else [1.0, number, 0.5])
    path.write_bytes(found)
    if with_index:
        path.with_suffix(".idx").write_text("".join(places))
    return path


def in_mxnet(script: str, *arguments: object) -> str:
    """What a script prints that MXNet's interpreter runs; skips the test where there is none."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} names no interpreter with mxnet and gluoncv: RecordIO was not compared with MXNet's own")
    words = [python, "-c", script, *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout
