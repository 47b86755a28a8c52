"""Lists of videos with labels of classes, as GluonCV trains on, with captions or with texts of the classes."""

from __future__ import annotations

import argparse
import math
import posixpath
from collections.abc import Iterator
from os.path import isdir
from pathlib import Path
from typing import NamedTuple

from data_tools.formats import Record, video_path
from data_tools.formats.caption_files import CaptionFile
from data_tools.formats.tables import existing_folder, read_text
from dsmoe_vl.errors import DataError

NAME = "videolist"
HELP = "GluonCV's lists of videos (train.txt: path, number of frames, label), with captions or texts of the classes"
DESCRIPTION = """\
Expected files:

    ucf/
      train.txt            archery/a.mp4 240 2        path, number of frames, label
                           or archery/a 2             path, label
                           or archery/a 0 90 2        path, start, end, label; a line for each part
      videos/archery/a.mp4          a path without an ending is that of mp4, webm, mkv or avi
      captions.csv         file,text                  or tsv, jsonl, parquet; or a .json, {"archery/a.mp4": "..."}
      or classes.txt       a person shoots an arrow   line n, from 0, is the text of label n

The number of columns decides which list it is. A label alone says nothing in words: give --captions, or texts of the
classes that you wrote yourself. Videos of one such text have the same `content`, so that they are no negatives of each
other. Texts of several parts of a video are one caption, in time order. Labels, starts and ends are kept in KEY.json.
A folder of frames is rejected.

Example:

    python -m data_tools.convert videolist --videos ucf/videos --list ucf/train.txt --classes ucf/classes.txt \\
        --output shards/ucf
"""

_FORMS = {2: "path, label", 3: "path, number of frames, label", 4: "path, start, end, label"}


class _Line(NamedTuple):
    """A line: the video, its class, and the start and end of the part; (), without."""

    file: str
    label: int
    part: tuple[float, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos`, `--list`, and `--captions` or `--classes`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder that the paths begin in")
    parser.add_argument("--list", type=Path, required=True, metavar="FILE", help="train.txt and the like")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--captions", type=Path, metavar="FILE", help="captions by path")
    texts.add_argument("--classes", type=Path, metavar="FILE", help="texts of the labels, one per line")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per video, in the order of first mention, then one per malformed line.

    Raises DataError if a file is missing or another one, or if the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    captions = CaptionFile(arguments.captions, "--captions") if arguments.captions else None
    classes = read_text(arguments.classes, "--classes").splitlines() if arguments.classes else []
    arguments.left = ""  # for `unused`, which is called when all records are read
    videos: dict[str, list[_Line]] = {}
    malformed: list[Record] = []
    columns = 0
    for number, text in enumerate(read_text(arguments.list, "--list").split("\n"), 1):
        cells = text.split()
        if not cells:
            continue
        try:
            line = _line(cells, columns)
        except ValueError as error:
            if not columns:
                raise DataError(
                    f"--list {arguments.list}, line {number}: {text[:80]!r}: {error}: a line is one of "
                    f"{'; '.join(_FORMS.values())}, with spaces between"
                ) from error
            problem = f"malformed line: {arguments.list.name}, line {number}: {error}: {text[:80]!r}"
            malformed.append(Record(f"line {number}", "video", None, [], problem=problem))
            continue
        columns = len(cells)
        videos.setdefault(line.file, []).append(line)
    for name, lines in videos.items():
        yield _record(folder, name, lines, captions, classes)
    yield from malformed
    if captions:
        captions.require_use(next(iter(videos), ""))
        arguments.left = captions.unused()


def unused(arguments: argparse.Namespace) -> str:
    """Captions of videos that the list does not have; "" without any."""
    left: str = arguments.left
    return left


def _line(cells: list[str], columns: int) -> _Line:
    """Raises ValueError, with the reason. `columns`: of the lines before; 0: none."""
    if len(cells) not in _FORMS or columns not in (0, len(cells)):
        raise ValueError(f"{len(cells)} columns" + (f", not {columns} as in the lines before" if columns else ""))
    file, *numbers, label = cells
    if not (label.isascii() and label.isdigit() and len(label) < 10):
        raise ValueError(f"the label {label!r:.40} is no whole number")
    values = tuple(map(float, numbers))
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"{' '.join(numbers):.60} are no numbers of frames or seconds")
    part = values if len(values) == 2 else ()
    if part and part[1] <= part[0]:
        raise ValueError(f"the part from {part[0]:g} to {part[1]:g} is empty")
    return _Line(posixpath.normpath(file), int(label), part)


def _record(folder: Path, name: str, lines: list[_Line], captions: CaptionFile | None, classes: list[str]) -> Record:
    lines = sorted(lines, key=lambda line: line.part)
    parts = [list(line.part) for line in lines if line.part]
    own = {"label": [line.label for line in lines], "part": parts or None}
    media = folder / name if "." in posixpath.basename(name) else video_path(folder, name)
    problem = ""
    if name.startswith(("/", "../")) or name in (".", ".."):
        problem = f"outside of the folder: {name} is not in {folder}"
    elif isdir(folder / name):
        problem = f"folder of frames: {folder / name}: make a video of it, as ffmpeg does"
    unknown = [line.label for line in lines if line.label >= len(classes)]
    if captions is not None:
        texts = captions.of(dict.fromkeys((name, media.relative_to(folder).as_posix())) if not problem else (name,))
    elif unknown:
        texts, problem = [], problem or f"unknown label: {unknown[0]}, and there are {len(classes)} texts of classes"
    else:
        texts = list(dict.fromkeys(classes[line.label].strip() for line in lines))
        texts = [" ".join(classes[line.label].strip() for line in lines)] if parts else texts
    content = {"content": f"{NAME}: {' '.join(texts)}"} if captions is None and texts else {}
    return Record(name, "video", None if problem else media, texts, {NAME: own, **content}, problem)
