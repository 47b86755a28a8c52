"""Readers of raw datasets. A format is a module with

    NAME: str                                       the subcommand of `python -m data_tools.convert`
    HELP: str                                       its one line in the list of formats
    DESCRIPTION: str                                the expected files, with an example
    add_arguments(parser) -> None                   its options
    records(arguments) -> Iterator[Record]          DataError where the annotations cannot be read

`records` reads annotations alone, no media, and yields the same records in the same order every time: every process of
a conversion enumerates them. A new format is added to `convert.FORMATS`; `tables.py` reads what annotations come in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsmoe_vl.data.sample import VIDEO_EXTENSIONS


@dataclass(frozen=True)
class Stored:
    """A file inside of a larger one, a tar: `size` bytes at `offset` of `path`. `name` is its own name there."""

    path: Path
    offset: int
    size: int
    name: str

    @property
    def suffix(self) -> str:
        """The extension of `name`, with its dot."""
        return Path(self.name).suffix

    def read_bytes(self) -> bytes:
        """The file's bytes. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Record:
    """One image or video with its captions, as a dataset's annotations describe it; nothing of it was checked.

    `identifier` is unique within the dataset. `captions` may hold anything that the annotations held; those that are no
    text are dropped, and a record without any is rejected unless it has a summary, saliency or importance.
    `meta` goes to KEY.json: url, licence, segments, saliency, summary, content, ... Its `tasks`, where it has them,
    replace those that follow from what the record holds. `problem`, `reason: detail`, says why the annotations alone
    make it unusable ("reversed timestamps: 12.5 to 3.0 s"); it is then rejected with that reason.
    """

    identifier: str
    kind: Literal["image", "video"]
    media: Path | Stored | None
    captions: list[Any]
    meta: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def video_path(folder: Path, name: str) -> Path:
    """The video `name` of a folder, whatever its extension; `name`.mp4 where there is none, to be reported missing."""
    candidates = [folder / f"{name}.{extension}" for extension in VIDEO_EXTENSIONS]
    return next((path for path in candidates if path.is_file()), candidates[0])
