"""Readers of raw datasets. A format is a module with

    NAME: str                                       the subcommand of `python -m data_tools.convert`
    HELP: str                                       its one line in the list of formats
    DESCRIPTION: str                                the expected files, with an example
    add_arguments(parser) -> None                   its options
    records(arguments) -> Iterator[Record]          raises DataError if the annotations cannot be read
    unused(arguments) -> str                        optional: files that become no record, for the summary

`records` reads annotations, not media (of files with unusual names the first bytes), and always yields the same records
in the same order, because a command that continues a conversion compares them. One process reads them, one at a time;
what a format itself keeps of all is its own. A new format is added to `convert.FORMATS`.
`tables.py` reads annotation files.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from os.path import isfile
from pathlib import Path
from typing import Any, Literal

from dsmoe_vl.data.media_kind import kind_of_file
from dsmoe_vl.data.sample import VIDEO_EXTENSIONS

IsMeant = Callable[[Path], object]  # whether a file is of the kind that is looked for


@dataclass(frozen=True)
class Stored:
    """A file in a tar: `size` bytes at `offset` of `path`. `name`: its name in the tar."""

    path: Path
    offset: int
    size: int
    name: str

    @property
    def suffix(self) -> str:
        """The extension of `name`, with its dot."""
        return Path(self.name).suffix

    def read_bytes(self, most: int | None = None) -> bytes:
        """The file's bytes, the first `most` of them if given. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size if most is None else min(self.size, most))


@dataclass(frozen=True)
class Rendered:
    """A picture or video that is made of the file `path` when it is read, in the process that checks the record."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def read_bytes(self) -> bytes:
        """The encoded picture or video; the same file gives the same bytes. Raises OSError, and DataError if it cannot
        be made."""
        raise NotImplementedError


@dataclass(frozen=True)
class Record:
    """One image, video or recording with its captions, as the annotations of a dataset describe it, unchecked.

    `identifier`: unique in the dataset. `captions`: any values; those that are not text are dropped. A record without
    captions is rejected unless it has a summary, saliency or importance, or a recording with a transcript or beside a
    picture. `meta` goes to KEY.json: url, licence, segments, saliency, summary, transcript, content, ... `tasks` in it
    replaces the tasks that follow from the annotations. `recording`: of speech, beside `media` or instead of them;
    without media the `kind` means nothing.
    `notes`: what the annotations lack and a user should know, if the record is used, each as `kind: detail`.
    `problem`: why the annotations make the record unusable, as `reason: detail` ("reversed timestamps: 12.5 to 3.0 s");
    it is rejected with this reason.
    """

    identifier: str
    kind: Literal["image", "video"]
    media: Path | Stored | Rendered | None
    captions: list[Any]
    meta: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    recording: Path | Stored | None = None
    notes: tuple[str, ...] = ()

    @property
    def has(self) -> tuple[str, ...]:
        """What it has of "image", "video" and "speech". One that names no file at all lacks the file of its kind."""
        kind = () if self.media is None and self.recording is not None else (self.kind,)
        return (*kind, "speech") if self.recording is not None else kind


def video_path(folder: Path, name: str) -> Path:
    """The video `name` in a folder, with any extension; if missing, the path `name`.mp4, to be reported."""
    return with_ending(folder, name, VIDEO_EXTENSIONS) or folder / f"{name}.{VIDEO_EXTENSIONS[0]}"


def with_ending(folder: Path, name: str, usual: tuple[str, ...], is_meant: IsMeant = kind_of_file) -> Path | None:
    """The file in a folder whose name without its extension, or with it, is `name`; None if there is none.

    Files with one of the `usual` extensions come first, in their order. Of the others, `is_meant` says whether a file
    may be used at all: by default, if it is an image or video.
    """
    candidates = (folder / f"{name}.{extension}" for extension in usual)
    if found := next((path for path in candidates if isfile(path)), None):  # False for an impossible name
        return found
    place = (folder / name).parent
    return _unusual_names(place, _changed(place), usual, is_meant).get(posixpath.basename(name))


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except (OSError, ValueError):  # ValueError: an impossible file name
        return 0


@lru_cache(maxsize=4096)
def _unusual_names(folder: Path, _changed: int, usual: tuple[str, ...], is_meant: IsMeant) -> dict[str, Path]:
    """The files in a folder that `with_ending` does not find by usual extensions: by their names, also without them."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.removeprefix(".") not in usual)
    except (OSError, ValueError):
        return {}
    found: dict[str, Path] = {}
    for path in paths:
        if isfile(path) and is_meant(path):
            found.setdefault(path.stem, path)
            found.setdefault(path.name, path)
    return found
