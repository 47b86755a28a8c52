"""VATEX: one JSON file of clips with ten captions in English and ten in Chinese beside a folder of clips."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record, video_path
from data_tools.formats.identifiers import Unique, identifier
from data_tools.formats.tables import existing_folder, read_json
from dsmoe_vl.errors import DataError

NAME = "vatex"
HELP = "VATEX (vatex_training_v1.0.json and the like)"
DESCRIPTION = """\
Expected files:

    vatex/
      vatex_training_v1.0.json                [{"videoID": "Ptf_2VRj-V0_000122_000132",
                                                "enCap": ["A person ...", ...], "chCap": ["...", ...]}, ...]
      videos/Ptf_2VRj-V0_000122_000132.mp4     ten seconds of a YouTube video, named by `videoID`

Many of the videos are no longer on YouTube: `--max-rejected` is the fraction of clips that may be missing.

Example:

    python -m data_tools.convert vatex --videos vatex/videos --annotations vatex/vatex_training_v1.0.json \\
        --max-rejected 0.3 --output shards/vatex_train
"""

CAPTIONS = {"en": "enCap", "zh": "chCap"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos`, `--annotations` and `--language`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the clips")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="vatex_*.json")
    parser.add_argument("--language", choices=list(CAPTIONS), default="en", help="of the captions (%(default)s)")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per clip, in the order of the file.

    Raises DataError if the file is missing, not of VATEX or has no captions in the language, or the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    path: Path = arguments.annotations
    rows = read_json(path, "--annotations")
    column = CAPTIONS[arguments.language]
    captions: dict[str, list[Any]] = {}
    unique = Unique()
    try:
        for number, row in enumerate(rows):
            texts, place = row.get(column, []), f"--annotations {path}, entry {number}"
            clip = unique.add(identifier(row["videoID"], place), place)
            captions[clip] = texts if isinstance(texts, list) else [texts]
        found = any(column in row for row in rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--annotations {path}: not a VATEX file ({error!r}): a list of objects with videoID and {column} is needed"
        ) from error
    if not found:
        raise DataError(
            f"--annotations {path}: no {column} in it: the private test file has no captions, the public one only "
            "those in English (--language en)"
        )
    for clip, texts in captions.items():
        video = clip.rsplit("_", 2)[0]
        meta = {"url": f"https://www.youtube.com/watch?v={video}"}
        yield Record(clip, "video", video_path(folder, clip), texts, meta)
