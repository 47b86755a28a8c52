"""MSR-VTT: one JSON file of clips and sentences beside a folder of clips."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record, video_path
from data_tools.formats.identifiers import Unique, identifier
from data_tools.formats.tables import existing_folder, read_json, read_rows
from data_tools.formats.timeline import Problem, time_range
from dsmoe_vl.errors import DataError

NAME = "msrvtt"
HELP = "MSR-VTT (train_val_videodatainfo.json, MSRVTT_data.json and the like)"
DESCRIPTION = """\
Expected files:

    msrvtt/
      MSRVTT_data.json              {"videos":    [{"video_id": "video7010", "split": "test", "url": "https://...",
                                                    "start time": 137.72, "end time": 149.44, ...}, ...],
                                     "sentences": [{"video_id": "video7010", "caption": "a man ...", ...}, ...]}
      MSRVTT_JSFUSION_test.csv      key,vid_key,video_id,sentence     optional: the clips of the 1k-A test
      MSRVTT_train.9k.csv           video_id                          optional: the clips of its training part
      TrainValVideo/video7010.mp4   one file per clip, named by `video_id`

Examples:

    python -m data_tools.convert msrvtt --videos msrvtt/TrainValVideo --annotations msrvtt/MSRVTT_data.json \\
        --part train --output shards/msrvtt_train
    python -m data_tools.convert msrvtt --videos msrvtt/all --annotations msrvtt/MSRVTT_data.json \\
        --subset msrvtt/MSRVTT_JSFUSION_test.csv --output shards/msrvtt_1ka --split test
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos`, `--annotations`, and `--part` or `--subset`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the clips")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="JSON of videos and sentences")
    # Not both: 1k-A divides the clips in another way than the original split.
    selection = parser.add_mutually_exclusive_group()
    selection.add_argument("--part", choices=["train", "validate", "test"], help="clips of this `split` (default: all)")
    selection.add_argument(
        "--subset", type=Path, metavar="FILE", help="csv with `video_id`; a column `sentence` replaces the captions"
    )


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per clip: the subset in its order, or `videos` in order and then those in `sentences` only.

    Raises DataError if a file is missing or malformed, the folder is missing, or `--part` selects nothing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    path: Path = arguments.annotations
    content = read_json(path, "--annotations")
    captions: dict[str, list[Any]] = {}
    unique = Unique()
    try:
        videos = {}
        for number, row in enumerate(content["videos"]):
            place = f"--annotations {path}, videos[{number}]"
            videos[unique.add(identifier(row["video_id"], place), place)] = row
        splits = {name: row.get("split") for name, row in videos.items()}
        for number, row in enumerate(content["sentences"]):
            video = identifier(row["video_id"], f"--annotations {path}, sentences[{number}]")
            of_video = captions.setdefault(video, [])
            if row["caption"] not in of_video:  # annotators repeated some sentences
                of_video.append(row["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--annotations {path}: not an MSR-VTT file ({error!r}): `videos` needs video_id, `sentences` video_id and "
            "caption"
        ) from error
    if arguments.subset:
        selected = _subset(arguments.subset, captions)
    else:
        selected = [name for name in videos if arguments.part in (None, splits[name])]
        if arguments.part and not selected:
            found = ", ".join(sorted({str(split) for split in splits.values()})) or "no videos"
            raise DataError(f"--part {arguments.part}: no such `split` in {path}, which has {found}")
    for name in selected:
        yield _record(folder, name, videos.get(name, {}), captions.get(name, []))
    if not arguments.subset:
        for name in sorted(captions.keys() - videos.keys()):
            yield Record(name, "video", None, captions[name])


def _record(folder: Path, name: str, row: dict[str, Any], captions: list[Any]) -> Record:
    meta: dict[str, Any] = {"url": row.get("url")}
    problem = ""
    times = [row.get("start time"), row.get("end time")]
    if times != [None, None]:
        try:
            # The place of the clip in the video at `url`; not times in the clip.
            meta["url_start_seconds"], meta["url_end_seconds"] = time_range(times)
        except Problem as error:
            problem = str(error)
    return Record(name, "video", video_path(folder, name), captions, meta, problem)


def _subset(path: Path, captions: dict[str, list[Any]]) -> list[str]:
    """The videos of a csv, in the order of first mention. Its sentences, if any, replace `captions`."""
    sentences: dict[str, list[Any]] = {}
    for line, row in read_rows(path, "--subset"):
        if "video_id" not in row:
            raise DataError(f"--subset {path}, line {line}: no 'video_id' among {', '.join(row)}: not a 1k-A file")
        of_video = sentences.setdefault(identifier(row["video_id"], f"--subset {path}, line {line}"), [])
        if "sentence" in row:
            of_video.append(row["sentence"])
    captions.update({name: texts for name, texts in sentences.items() if texts})
    return list(sentences)
