"""MSVD (the Microsoft Research Video Description Corpus): one text or CSV file of descriptions, a folder of clips."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record, video_path
from data_tools.formats.tables import csv_rows, existing_folder, read_text
from dsmoe_vl.errors import DataError

NAME = "msvd"
HELP = "MSVD (AllVideoDescriptions.txt or video_corpus.csv)"
DESCRIPTION = """\
Expected files:

    msvd/
      AllVideoDescriptions.txt           # a comment
                                         mv89psg6zh4_33_46 A bird takes a bath.
      or video_corpus.csv                VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description
                                         mv89psg6zh4,33,46,588702,clean,55,English,A bird ...
      YouTubeClips/mv89psg6zh4_33_46.avi

The content shows which of the two it is. Only the English descriptions of the csv file are kept.

Example:

    python -m data_tools.convert msvd --videos msvd/YouTubeClips --annotations msvd/AllVideoDescriptions.txt \\
        --output shards/msvd
"""

COLUMNS = ("VideoID", "Start", "End", "Language", "Description")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos` and `--annotations`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the clips")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="txt or csv of descriptions")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per clip with a description in English, in the order of first mention.

    Raises DataError if the file is missing or neither of the two, or the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    path: Path = arguments.annotations
    text = read_text(path, "--annotations")
    captions: dict[str, list[Any]] = {}
    for clip, caption in _csv(path) if text.lstrip().startswith("VideoID,") else _lines(path, text):
        captions.setdefault(clip, []).append(caption)
    for clip, texts in captions.items():
        video, start, end = clip.rsplit("_", 2)
        meta = {
            "url": f"https://www.youtube.com/watch?v={video}",
            "url_start_seconds": int(start),
            "url_end_seconds": int(end),
        }
        yield Record(clip, "video", video_path(folder, clip), texts, meta)


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Clip and caption of every line."""
    for line, content in enumerate(text.split("\n"), 1):
        if content.startswith("#") or not content.strip():
            continue
        clip, *caption = content.split(maxsplit=1)
        if not re.fullmatch(r".+_\d+_\d+", clip):
            raise DataError(
                f"--annotations {path}, line {line}: {clip[:40]!r} is not VIDEOID_start_end: give "
                "AllVideoDescriptions.txt, or video_corpus.csv with its header"
            )
        yield clip, "".join(caption)


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Clip and description of every row in English."""
    for line, row in csv_rows(path, "--annotations"):
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            raise DataError(f"--annotations {path}: no {missing[0]!r} among {', '.join(row)}: not video_corpus.csv")
        if (row["Language"] or "").strip() != "English":
            continue
        clip = "_".join((row[column] or "").strip() for column in ("VideoID", "Start", "End"))
        if not re.fullmatch(r".+_\d+_\d+", clip):
            raise DataError(f"--annotations {path}, line {line}: Start and End must be whole seconds, not {clip!r}")
        yield clip, row["Description"]
