"""QVHighlights: JSON lines of queries, each with its moments in a video and the scores of three annotators."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats import Record, video_path
from data_tools.formats.identifiers import Unique, identifier
from data_tools.formats.tables import existing_folder, jsonl_rows
from data_tools.formats.timeline import Problem, checked_scores, positive_seconds, segments
from dsmoe_vl.errors import DataError

NAME = "qvhighlights"
HELP = "QVHighlights (highlight_train_release.jsonl and the like)"
DESCRIPTION = """\
Expected files:

    qvhighlights/
      highlight_val_release.jsonl            an object per line:
          {"qid": 2579, "query": "A cat sleeps ...", "duration": 150, "vid": "NUsG9BgSes0_210.0_360.0",
           "relevant_windows": [[82, 150]],                  seconds
           "relevant_clip_ids": [41, 42, ...],               clips of two seconds, from 0
           "saliency_scores": [[4, 3, 4], [4, 3, 4], ...]}   for each of those clips: three annotators, 0 to 4
      videos/NUsG9BgSes0_210.0_360.0.mp4     named by `vid`

Each query becomes a sample, with the query as caption and summary. `saliency` has the score / 4 of each annotator, 0
for clips that are not relevant. A video with several queries is stored several times, with the same `content`. Queries
without the last three fields, as in the public test file, become captions only.

Example:

    python -m data_tools.convert qvhighlights --videos qvhighlights/videos \\
        --annotations qvhighlights/highlight_val_release.jsonl --output shards/qvhighlights_val --split val
"""

CLIP_SECONDS = 2
LABELS = ("relevant_windows", "relevant_clip_ids", "saliency_scores")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos` and `--annotations`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the videos")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="highlight_*_release.jsonl")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per query, in order, followed by its unusable windows as `qid`#n.

    Raises DataError if the file is missing or not of QVHighlights, or the folder is missing.
    """
    folder = existing_folder(arguments.videos, "--videos")
    path: Path = arguments.annotations
    unique = Unique()
    for line, row in jsonl_rows(path, "--annotations"):
        labels = [name for name in LABELS if name in row]
        needed = ("qid", "query", "duration", "vid", *(LABELS if labels else ()))
        missing = [name for name in needed if name not in row]
        if missing:
            raise DataError(f"--annotations {path}, line {line}: no {missing[0]!r}: give a highlight_*_release.jsonl")
        place = f"--annotations {path}, line {line}"
        query, video = row["query"], identifier(row["vid"], place)
        query_id, media = unique.add(identifier(row["qid"], place), place), video_path(folder, video)
        meta: dict[str, Any] = {"content": video}
        rejected: list[Record] = []
        try:
            if not isinstance(query, str) or not query.strip():
                raise Problem(f"empty caption: {query!r:.60}")
            if labels:
                duration = positive_seconds(row["duration"])
                windows = row["relevant_windows"]
                texts = [query] * len(windows) if isinstance(windows, list) else query
                meta["segments"], rejected = segments(query_id, windows, texts, duration)
                meta["saliency"] = clip_scores(row["relevant_clip_ids"], row["saliency_scores"], duration).tolist()
                meta["summary"] = query
        except Problem as problem:
            yield Record(query_id, "video", media, [query], problem=str(problem))
            continue
        yield Record(query_id, "video", media, [query], meta)
        yield from rejected


def clip_scores(clips: Any, scores: Any, duration: float) -> np.ndarray:
    """Importance from 0 to 1 of all clips of a video: float64 [annotators, ceil(duration / 2)].

    Args:
        clips: numbers of the relevant clips, from 0.
        scores: their scores from 0 to 4: [clips, annotators].

    Raises Problem if these do not fit each other or the video.
    """
    count = math.ceil(duration / CLIP_SECONDS)
    if not isinstance(clips, list) or not all(type(clip) is int and 0 <= clip < count for clip in clips):
        raise Problem(f"clips outside of the video: {clips!r:.60}, not from 0 to {count - 1}")
    given = checked_scores(scores, 0, 4)
    if len(given) != len(clips):
        raise Problem(f"unequal annotations: scores of {len(given)} clips for {len(clips)} relevant ones")
    curves = np.zeros((given.shape[1], count))
    curves[:, clips] = given.T / 4
    return curves
