"""Images and videos, each with its captions in a text file beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from data_tools.formats import Record
from dsmoe_vl.data.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


def media_kind(name: str) -> Literal["image", "video"] | None:
    """What a file is by its extension; None where that is neither."""
    extension = PurePosixPath(name).suffix.lower().removeprefix(".")
    return "image" if extension in IMAGE_EXTENSIONS else "video" if extension in VIDEO_EXTENSIONS else None


def records_beside_text(folder: Path) -> Iterator[Record]:
    """One record an image or video in `folder` and below, by path, then one for each text file that belongs to none.

    NAME.txt has the captions of NAME.jpg, one a line. Where it is missing or no UTF-8, the record has a problem.
    """
    # Hidden files are no data: macOS leaves a ._NAME.jpg beside each NAME.jpg that it packs.
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    texts = {path for path in paths if path.suffix == ".txt"}
    unused = set(texts)
    for path in paths:
        kind, text = media_kind(path.name), path.with_suffix(".txt")
        if not kind:
            continue
        unused.discard(text)
        lines, problem = [], ""
        if text in texts:
            try:
                lines = (folder / text).read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"unreadable text file: {text}: {error}"
        else:
            problem = f"missing text file: {text} with the captions of {path.name}"
        yield Record(path.as_posix(), kind, folder / path, [line for line in lines if line.strip()], problem=problem)
    for path in sorted(unused):
        yield Record(path.as_posix(), "image", None, [], problem=f"missing media: no image or video beside {path}")
