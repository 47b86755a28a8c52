"""WebVid: a CSV file of stock videos and captions, with local copies of the videos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from os.path import isfile
from pathlib import Path

from data_tools.formats import Record, video_path
from data_tools.formats.tables import csv_rows, existing_folder
from dsmoe_vl.errors import DataError

NAME = "webvid"
HELP = "WebVid (results_2M_train.csv and the like) with local copies of the videos"
DESCRIPTION = """\
Expected files:

    webvid/
      results_2M_val.csv              videoid,contentUrl,duration,page_dir,name
                                      1066674784,https://...mp4,PT00H00M10S,006001_006050,Travel blogger ...
      videos/006001_006050/1066674784.mp4      or, without the folder `page_dir`, videos/1066674784.mp4

Nothing is downloaded.

Example:

    python -m data_tools.convert webvid --videos webvid/videos --annotations webvid/results_2M_val.csv \\
        --output shards/webvid_val --split val
"""

COLUMNS = ("videoid", "contentUrl", "page_dir", "name")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos` and `--annotations`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the videos")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="results_*.csv")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per row, in order.

    A few videos occur twice: their second row is rejected as `videoid`#line. To join their captions, all ten million
    would have to be in memory.

    Raises DataError if the file is missing, malformed or lacks a column, or the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    path: Path = arguments.annotations
    seen: dict[str, int] = {}
    for line, row in csv_rows(path, "--annotations"):
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            raise DataError(f"--annotations {path}: no {missing[0]!r} among {', '.join(row)}: not a WebVid file")
        video = (row["videoid"] or "").strip()
        if not video:
            raise DataError(f"--annotations {path}, line {line}: no videoid: remove the line")
        media = _local(folder, (row["page_dir"] or "").strip(), video)
        first = seen.setdefault(video, line)
        if first != line:
            problem = f"repeated video: line {line}, first on line {first}"
            yield Record(f"{video}#{line}", "video", media, [row["name"]], problem=problem)
            continue
        yield Record(video, "video", media, [row["name"]], {"url": row["contentUrl"]})


def _local(folder: Path, page: str, video: str) -> Path:
    """The copy in the folder `page`, or else in `folder`; if missing, the path in `page`."""
    paged = video_path(folder / page, video)
    flat = video_path(folder, video)
    return flat if isfile(flat) and not isfile(paged) else paged
