"""TVSum: importance scores of 20 annotators for every frame of 50 videos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.formats import Record, video_path
from data_tools.formats.tables import existing_folder, read_text
from data_tools.formats.timeline import Problem, checked_scores
from dsmoe_vl.errors import DataError

NAME = "tvsum"
HELP = "TVSum (ydata-tvsum50-anno.tsv and -info.tsv)"
DESCRIPTION = """\
Expected files:

    ydata-tvsum50-v1_1/
      data/ydata-tvsum50-anno.tsv      AwmHb44_ouw<tab>VT<tab>1,1,1,3,3,...     20 lines a video, no header; a score
                                                                               from 1 to 5 for each frame
      data/ydata-tvsum50-info.tsv      category<tab>video_id<tab>title<tab>url<tab>length
      video/AwmHb44_ouw.mp4

The title is both caption and summary: TVSum has no other text. Of the scores every 15th frame's are kept, as
(score - 1) / 4: the published rank correlations are computed from these (Otani et al. 2019), and lists of all frames
would make KEY.json megabytes long. `annotated_frames` is how many there were.

Example:

    python -m data_tools.convert tvsum --videos ydata-tvsum50-v1_1/video \\
        --annotations ydata-tvsum50-v1_1/data/ydata-tvsum50-anno.tsv \\
        --info ydata-tvsum50-v1_1/data/ydata-tvsum50-info.tsv --output shards/tvsum
"""

STEP = 15  # frames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos`, `--annotations` and `--info`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the videos")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="ydata-tvsum50-anno.tsv")
    parser.add_argument("--info", type=Path, required=True, metavar="FILE", help="ydata-tvsum50-info.tsv")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record a video, in the order of the annotations, then those that only the titles know.

    Raises DataError where a file is missing or malformed, or the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    scores: dict[str, list[str]] = {}
    for video, _, row in _cells(arguments.annotations, "--annotations", 3):
        scores.setdefault(video, []).append(row)
    titles: dict[str, tuple[str, str, str]] = {}
    for category, video, title, url, _ in _cells(arguments.info, "--info", 5):
        if video != "video_id" and title:  # it stands in the header
            titles[video] = (title.strip('"'), url, category)
    for video in [*scores, *(video for video in titles if video not in scores)]:
        media = video_path(folder, video)
        try:
            if video not in scores:
                raise Problem(f"no scores: none in {arguments.annotations}")
            if video not in titles:
                raise Problem(f"no title: none in {arguments.info}")
            title, url, category = titles[video]
            curves, frames = sampled_scores(scores[video])
        except Problem as problem:
            yield Record(video, "video", media, [], problem=str(problem))
            continue
        meta = {
            "url": url,
            "category": category,
            "summary": title,
            "saliency": curves.tolist(),
            "annotated_frames": frames,
        }
        yield Record(video, "video", media, [title], meta)


def sampled_scores(rows: list[str]) -> tuple[np.ndarray, int]:
    """Every STEP-th frame's scores in 0 to 1, float64 [annotators, ceil(frames / STEP)], and the number of frames.

    Annotators' lists end up to a STEP apart, and are cut to the shortest. The last value stands for fewer than STEP
    frames but is read as an equal part of the video: times shift by less than STEP frames, a quarter of a scored shot.

    Raises Problem for what is no score, or lists that do not belong to one video.
    """
    lists = [row.split(",") for row in rows]
    frames, longest = min(map(len, lists)), max(map(len, lists))
    if longest - frames >= STEP:
        raise Problem(f"unequal annotations: {frames} to {longest} frames")
    scores = checked_scores([scores[:frames] for scores in lists], 1, 5)
    return (scores[:, ::STEP] - 1) / 4, frames


def _cells(path: Path, option: str, columns: int) -> Iterator[list[str]]:
    """The cells of every line that is not blank. A quotation mark in a title means nothing."""
    for line, text in enumerate(read_text(path, option).split("\n"), 1):
        if not text.strip():
            continue
        cells = [cell.strip() for cell in text.split("\t")]
        if len(cells) != columns:
            raise DataError(
                f"{option} {path}, line {line}: {len(cells)} cells between tabs, not {columns}: give the tsv file "
                "as it was published"
            )
        yield cells
