"""TVSum: importance scores of 20 annotators for every frame of 50 videos."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.formats import Record, video_path
from data_tools.formats.identifiers import Unique
from data_tools.formats.tables import existing_folder, read_text
from data_tools.formats.timeline import Problem, checked_scores
from dsmoe_vl.errors import DataError

NAME = "tvsum"
HELP = "TVSum (ydata-tvsum50-anno.tsv and -info.tsv)"
DESCRIPTION = """\
Expected files:

    ydata-tvsum50-v1_1/
      data/ydata-tvsum50-anno.tsv      AwmHb44_ouw<tab>VT<tab>1,1,1,3,3,...     20 lines per video, no header; a score
                                                                               from 1 to 5 for each frame
      data/ydata-tvsum50-info.tsv      category<tab>video_id<tab>title<tab>url<tab>length
      video/AwmHb44_ouw.mp4

TVSum has no texts but the titles, which become caption and summary. The scores of every 15th frame are kept, as
(score - 1) / 4: published rank correlations are computed from these (Otani et al. 2019), and the scores of all frames
would be megabytes. `annotated_frames` is the original number of frames.

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
    """One record per video, in the order of the annotations, then those that have only a title.

    Raises DataError if a file is missing or malformed, or the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    scores: dict[str, list[str]] = {}
    for _, (video, _, row) in _cells(arguments.annotations, "--annotations", 3):
        scores.setdefault(video, []).append(row)
    titles: dict[str, tuple[str, str, str]] = {}
    unique = Unique()
    for line, (category, video, title, url, _) in _cells(arguments.info, "--info", 5):
        if video != "video_id" and title:  # the header
            titles[unique.add(video, f"--info {arguments.info}, line {line}")] = (title.strip('"'), url, category)
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
    """Scores from 0 to 1 of every STEP-th frame, float64 [annotators, ceil(frames / STEP)]; and the number of frames.

    Annotators' lists differ by less than STEP frames and are cut to the shortest. The last value stands for fewer than
    STEP frames but is read as an equal part of the video: times shift by less than STEP frames, a quarter of a shot.

    Raises Problem for invalid scores, or lists that differ more in length.
    """
    lists = [row.split(",") for row in rows]
    frames, longest = min(map(len, lists)), max(map(len, lists))
    if longest - frames >= STEP:
        raise Problem(f"unequal annotations: {frames} to {longest} frames")
    scores = checked_scores([scores[:frames] for scores in lists], 1, 5)
    return (scores[:, ::STEP] - 1) / 4, frames


def _cells(path: Path, option: str, columns: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every line that is not blank. Quotation marks have no special meaning."""
    for line, text in enumerate(read_text(path, option).split("\n"), 1):
        if not text.strip():
            continue
        cells = [cell.strip() for cell in text.split("\t")]
        if len(cells) != columns:
            raise DataError(
                f"{option} {path}, line {line}: {len(cells)} cells between tabs, not {columns}: give the tsv file "
                "as it was published"
            )
        yield line, cells
