"""ActivityNet Captions: JSON files of sentences, each for a part of a video, beside a folder of videos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record, video_path
from data_tools.formats.tables import existing_folder, read_json
from data_tools.formats.timeline import Problem, positive_seconds, segments
from dsmoe_vl.errors import DataError

NAME = "activitynet"
HELP = "ActivityNet Captions (train.json, val_1.json, val_2.json)"
DESCRIPTION = """\
Expected files:

    activitynet/
      train.json                   {"v_QOlSCBRmfWY": {"duration": 82.73,
                                                      "timestamps": [[0.83, 19.86], [17.37, 60.81], ...],
                                                      "sentences": ["A girl enters.", " She ...", ...]}, ...}
      val_1.json, val_2.json       the same; two annotators saw the same videos
      videos/v_QOlSCBRmfWY.mp4     or webm, mkv, avi

Each file gives a video one caption: the paragraph of its sentences in time order. The sentences with their times become
`segments`. Times after the end of the video are cut. A sentence with reversed or empty times is left out and listed as
rejected: v_QOlSCBRmfWY#3 is the third one, v_QOlSCBRmfWY@2#3 the third one in the second file.

Example:

    python -m data_tools.convert activitynet --videos activitynet/videos \\
        --annotations activitynet/val_1.json activitynet/val_2.json --output shards/activitynet_val --split val
"""

FIELDS = ("duration", "timestamps", "sentences")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos` and `--annotations`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the videos")
    parser.add_argument(
        "--annotations", type=Path, required=True, nargs="+", metavar="FILE", help="train.json, or both val_*.json"
    )


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per video, in the order of first mention, followed by its rejected sentences.

    Raises DataError if a file is missing or not of ActivityNet Captions, or the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    files = [_read(path) for path in arguments.annotations]
    for video in dict.fromkeys(video for file in files for video in file):
        entries = [(number, file[video]) for number, file in enumerate(files, 1) if video in file]
        media = video_path(folder, video)
        captions: list[str] = []
        parts: list[dict[str, Any]] = []
        rejected: list[Record] = []
        try:
            for number, entry in entries:
                duration = positive_seconds(entry["duration"])
                identifier = video if number == 1 else f"{video}@{number}"
                found, bad = segments(identifier, entry["timestamps"], entry["sentences"], duration)
                captions.append(" ".join(part["caption"] for part in found))
                parts += [part if len(files) == 1 else {**part, "annotator": number} for part in found]
                rejected += bad
        except Problem as problem:
            yield Record(video, "video", media, [], problem=str(problem))
            continue
        meta = {"url": f"https://www.youtube.com/watch?v={video.removeprefix('v_')}", "segments": parts}
        yield Record(video, "video", media, captions, meta)
        yield from rejected


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, "--annotations", unique_keys=True)
    if not isinstance(content, dict):
        raise DataError(
            f"--annotations {path}: not of ActivityNet Captions: an object with videos as keys is expected (the list "
            "of test videos has no captions)"
        )
    for video, entry in content.items():
        missing = [name for name in FIELDS if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise DataError(
                f"--annotations {path}, {video!r}: no {missing[0]!r}: give train.json, val_1.json or val_2.json of "
                "ActivityNet Captions"
            )
    return content
