"""Images and videos with their captions in text files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.formats import Record
from dsmoe_vl.data.folder_walk import Passed, described, files_below
from dsmoe_vl.data.media_kind import NO_MEDIA, TEXT_EXTENSION, Kind, has_usual_name, kind_of_file


class _Files(NamedTuple):
    """Media with their kinds, text files by their path with the extension in small letters, and the others."""

    media: list[tuple[Path, Kind]]
    texts: dict[Path, Path]
    passed: list[Passed]


def records_beside_text(folder: Path) -> Iterator[Record]:
    """One record per image or video in `folder` and its subfolders, sorted by path, then one per unused text file.

    NAME.txt has the captions of NAME.jpg, one per line. If it is missing or not UTF-8, the record has a problem.
    """
    media, texts, _ = _files(folder)
    unused = dict(texts)
    for path, kind in media:
        text = _text_of(path)
        unused.pop(text, None)
        lines, problem = [], ""
        if text in texts:
            try:
                lines = texts[text].read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"unreadable text file: {texts[text].relative_to(folder)}: {error}"
        else:
            problem = f"missing text file: {text.relative_to(folder)} with the captions of {path.name}"
        captions = [line for line in lines if line.strip()]
        yield Record(path.relative_to(folder).as_posix(), kind, path, captions, problem=problem)
    for path in sorted(unused.values()):
        name = path.relative_to(folder)
        yield Record(name.as_posix(), "image", None, [], problem=f"missing media: no image or video beside {name}")


def unused_beside_text(folder: Path) -> str:
    """What becomes no record: counts by reason, with examples; "" without any."""
    return described(_files(folder).passed, folder)


def _files(folder: Path) -> _Files:
    """A file with an unusual name and no text beside it is passed over: it may be there for another purpose."""
    paths, passed = files_below(folder)
    texts = {_text_of(path): path for path in reversed(paths) if path.suffix.lower() == f".{TEXT_EXTENSION}"}
    found = _Files([], texts, passed)
    for path in paths:
        if path.suffix.lower() == f".{TEXT_EXTENSION}":
            continue
        kind = kind_of_file(path)
        if kind is None:
            passed.append((path, NO_MEDIA))
        elif _text_of(path) in texts or has_usual_name(path):
            found.media.append((path, kind))
        else:
            passed.append((path, f"{kind} without a text file"))
    return found


def _text_of(path: Path) -> Path:
    return path.with_suffix(f".{TEXT_EXTENSION}")
