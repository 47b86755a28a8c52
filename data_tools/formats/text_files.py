"""Images and videos with their captions in text files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from data_tools.formats import Record
from dsmoe_vl.data.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


def media_kind(name: str) -> Literal["image", "video"] | None:
    """The kind of a file by its extension; None for other extensions."""
    extension = PurePosixPath(name).suffix.lower().removeprefix(".")
    return "image" if extension in IMAGE_EXTENSIONS else "video" if extension in VIDEO_EXTENSIONS else None


def records_beside_text(folder: Path) -> Iterator[Record]:
    """One record per image or video in `folder` and its subfolders, sorted by path, then one per unused text file.

    NAME.txt has the captions of NAME.jpg, one per line. If it is missing or not UTF-8, the record has a problem.
    """
    # Hidden files are not data: macOS adds ._NAME.jpg beside NAME.jpg to archives.
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
