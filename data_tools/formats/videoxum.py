"""VideoXum: a JSON file of text summaries and of ten annotators' choices of seconds, beside a folder of videos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record, video_path
from data_tools.formats.identifiers import Unique, identifier
from data_tools.formats.tables import existing_folder, read_json
from data_tools.formats.timeline import Problem, checked_scores, positive_seconds, segments
from dsmoe_vl.errors import DataError

NAME = "videoxum"
HELP = "VideoXum (train_videoxum.json and the like)"
DESCRIPTION = """\
Expected files:

    videoxum/
      train_videoxum.json          [{"video_id": "v_QOlSCBRmfWY", "duration": 82.73, "sampled_frames": 83,
                                     "timestamps": [[0.83, 19.86], ...],       one per segment of the video
                                     "tsum": ["A girl enters.", ...],       one per segment
                                     "vsum": ...,                              not read: the same as
                                     "vsum_onehot": [[0, 0, 1, ...], ...]},    10 annotators x one frame per second
                                    ...]
      videos/v_QOlSCBRmfWY.mp4     the videos of ActivityNet

The joined sentences are both summary and caption; they come from ActivityNet Captions.

Example:

    python -m data_tools.convert videoxum --videos videoxum/videos --annotations videoxum/train_videoxum.json \\
        --output shards/videoxum_train
"""

FIELDS = ("video_id", "duration", "timestamps", "tsum", "vsum_onehot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos` and `--annotations`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the videos")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="*_videoxum.json")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per video, in the order of the file, followed by its sentences with unusable times.

    `saliency` is one curve per annotator, 1 for the seconds in the summary. The text summary is the published one and
    keeps the sentences with unusable times.

    Raises DataError if the file is missing or not of VideoXum, or the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    unique = Unique()
    for number, row in enumerate(_rows(arguments.annotations)):
        place = f"--annotations {arguments.annotations}, entry {number}"
        video = unique.add(identifier(row["video_id"], place), place)
        media = video_path(folder, video)
        try:
            parts, rejected = segments(video, row["timestamps"], row["tsum"], positive_seconds(row["duration"]))
            summary = " ".join(" ".join(text.split()) for text in row["tsum"] if isinstance(text, str))
            if not summary.strip():
                raise Problem("empty summary: no sentence in tsum")
            meta = {
                "url": f"https://www.youtube.com/watch?v={video.removeprefix('v_')}",
                "summary": summary,
                "saliency": checked_scores(row["vsum_onehot"], 0, 1).tolist(),
                "segments": parts,
            }
        except Problem as problem:
            yield Record(video, "video", media, [], problem=str(problem))
            continue
        yield Record(video, "video", media, [summary], meta)
        yield from rejected


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path, "--annotations")
    if not isinstance(rows, list):
        raise DataError(f"--annotations {path}: not of VideoXum: a list of videos is expected")
    for number, row in enumerate(rows):
        missing = [name for name in FIELDS if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(f"--annotations {path}, entry {number}: no {missing[0]!r}: give a *_videoxum.json")
    return rows
