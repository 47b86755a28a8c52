"""Images and videos with their captions in text files beside them, and recordings of speech with their words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.formats import Record
from data_tools.recordings import is_recording
from dsmoe_vl.data.folder_walk import Passed, described, files_below
from dsmoe_vl.data.media_kind import NO_MEDIA, TEXT_EXTENSION, Kind, has_usual_name, kind_of_file


class _Files(NamedTuple):
    """Media with their kinds; recordings and text files by the path of their text file, with the extension in small
    letters; and the others."""

    media: list[tuple[Path, Kind]]
    recordings: dict[Path, Path]
    texts: dict[Path, Path]
    passed: list[Passed]


def records_beside_text(folder: Path) -> Iterator[Record]:
    """One record per image, video or recording without one, in `folder` and its subfolders, sorted by path; then one
    per unused text file.

    NAME.txt has the captions of NAME.jpg, one per line; without NAME.jpg it has the words of NAME.flac. If it is not
    UTF-8, or an image or video has neither text nor recording, the record has a problem.
    """
    media, recordings, texts, _ = _files(folder)
    unused = dict(texts)
    alone = dict.fromkeys(recordings[text] for text in recordings.keys() - {_text_of(path) for path, _ in media})
    kinds: dict[Path, Kind] = {**dict(media), **dict.fromkeys(alone, "image")}
    for path in sorted(kinds):
        text = _text_of(path)
        unused.pop(text, None)
        lines, problem = [], ""
        if text in texts:
            try:
                lines = texts[text].read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"unreadable text file: {texts[text].relative_to(folder)}: {error}"
        elif text not in recordings:
            problem = f"missing text file: {text.relative_to(folder)} with the captions of {path.name}"
        captions = [line for line in lines if line.strip()]
        if path in alone and captions:
            captions = [" ".join(captions)]
        name, seen = path.relative_to(folder).as_posix(), None if path in alone else path
        yield Record(name, kinds[path], seen, captions, problem=problem, recording=recordings.get(text))
    for path in sorted(unused.values()):
        name = path.relative_to(folder).as_posix()
        problem = f"missing media: no image, video or recording beside {name}"
        yield Record(name, "image", None, [], problem=problem)


def unused_beside_text(folder: Path) -> str:
    """What becomes no record: counts by reason, with examples; "" without any."""
    return described(_files(folder).passed, folder)


def _files(folder: Path) -> _Files:
    """A file with an unusual name, or a recording, and no text beside it is passed over: it may be there for another
    purpose."""
    paths, passed = files_below(folder)
    texts = {_text_of(path): path for path in reversed(paths) if path.suffix.lower() == f".{TEXT_EXTENSION}"}
    found = _Files([], {}, texts, passed)
    media: list[tuple[Path, Kind]] = []
    for path in paths:
        if path.suffix.lower() == f".{TEXT_EXTENSION}":
            continue
        if has_usual_name(path) or not is_recording(path):
            kind = kind_of_file(path)
            if kind is None:
                passed.append((path, NO_MEDIA))
            else:
                media.append((path, kind))
        elif found.recordings.setdefault(_text_of(path), path) != path:
            passed.append((path, "a second recording of its name"))
    for path, kind in media:
        if _text_of(path) in texts or _text_of(path) in found.recordings or has_usual_name(path):
            found.media.append((path, kind))
        else:
            passed.append((path, f"{kind} without a text file"))
    for text in found.recordings.keys() - texts.keys() - {_text_of(path) for path, _ in found.media}:
        passed.append((found.recordings.pop(text), "recording without a text file, image or video"))
    passed.sort()
    return found


def _text_of(path: Path) -> Path:
    return path.with_suffix(f".{TEXT_EXTENSION}")
