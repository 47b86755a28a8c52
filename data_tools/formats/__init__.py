"""Readers of raw datasets. A format is a module with

    NAME: str                                       the subcommand of `python -m data_tools.convert`
    HELP: str                                       its one line in the list of formats
    DESCRIPTION: str                                the expected files, with an example
    add_arguments(parser) -> None                   its options
    records(arguments) -> Iterator[Record]          DataError where the annotations cannot be read

A new one is added to `convert.FORMATS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Record:
    """One image or video with its captions, as a dataset's annotations describe it; nothing of it was checked.

    `identifier` is unique within the dataset. `media` is None where something is captioned that the
    annotations do not list; `captions` may hold anything that they held. `meta` goes to KEY.json (url, licence).
    """

    identifier: str
    kind: Literal["image", "video"]
    media: Path | None
    captions: list[Any]
    meta: dict[str, Any] = field(default_factory=dict)
