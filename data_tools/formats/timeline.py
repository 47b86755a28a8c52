"""Checks of annotated time ranges and importance curves of videos."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from data_tools.formats import Record

LONGEST = 1e6  # seconds of a video, eleven days; a curve over more would fill the memory


class Problem(Exception):
    """Annotations are unusable. The message is a `Record.problem`."""


def finite(value: Any, name: str) -> float:
    """`value` as a number. Raises Problem, with its `name`, if it is not a number, NaN or infinite."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Problem(f"invalid {name}: {value!r:.60}")
    return number


def positive_seconds(value: Any) -> float:
    """The duration of a video. Raises Problem if it is not a positive number, or above LONGEST."""
    duration = finite(value, "duration")
    if not 0 < duration <= LONGEST:
        raise Problem(f"invalid duration: {duration} s")
    return duration


def time_range(pair: Any, duration: float = math.inf) -> tuple[float, float]:
    """Start and end in seconds, the end at most `duration`. Raises Problem for an invalid or empty range."""
    try:
        start, end = pair
    except (TypeError, ValueError):
        raise Problem(f"invalid timestamps: {pair!r:.60}") from None
    start, end = finite(start, "timestamps"), finite(end, "timestamps")
    if end < start:
        raise Problem(f"reversed timestamps: {start} to {end} s")
    if end == start:
        raise Problem(f"empty timestamps: {start} to {end} s")
    if start < 0 or start >= duration:
        raise Problem(f"timestamps outside of the video: {start} to {end} s of {duration} s")
    return start, min(end, duration)


def segments(
    identifier: str, timestamps: Any, captions: Any, duration: float
) -> tuple[list[dict[str, Any]], list[Record]]:
    """The captioned parts of a video in time order, which may overlap.

    Args:
        timestamps: [[start, end], ...] in seconds.
        captions: one for each.

    Returns:
        The usable parts, for `meta`; and for each other part a record with a problem, named `identifier`#n, from 1.

    Raises Problem if the two differ in length or are not lists.
    """
    if not isinstance(timestamps, list) or not isinstance(captions, list):
        raise Problem(f"invalid timestamps: {timestamps!r:.60} for {captions!r:.60}")
    if len(timestamps) != len(captions):
        raise Problem(f"invalid timestamps: {len(timestamps)} for {len(captions)} sentences")
    usable, rejected = [], []
    for number, (pair, caption) in enumerate(zip(timestamps, captions, strict=True), 1):
        try:
            start, end = time_range(pair, duration)
            if not isinstance(caption, str) or not caption.strip():
                raise Problem(f"empty caption: {start} to {end} s")
        except Problem as problem:
            rejected.append(Record(f"{identifier}#{number}", "video", None, [caption], problem=str(problem)))
        else:
            usable.append({"start_seconds": start, "end_seconds": end, "caption": " ".join(caption.split())})
    return sorted(usable, key=lambda part: (part["start_seconds"], part["end_seconds"])), rejected


def checked_scores(rows: Any, lowest: float, highest: float) -> np.ndarray:
    """The unchanged scores of annotators for the parts of a video, `lowest` to `highest`: float64 [annotators, parts].

    Raises Problem if rows differ in length or have anything else.
    """
    try:
        scores = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise Problem("invalid scores: not numbers, or rows of different lengths") from None
    if scores.ndim != 2 or scores.size == 0:
        raise Problem(f"invalid scores: shape {list(scores.shape)}, not annotators x parts")
    if not np.isfinite(scores).all():
        raise Problem(f"invalid scores: {np.count_nonzero(~np.isfinite(scores))} NaN or infinite")
    if scores.min() < lowest or scores.max() > highest:
        raise Problem(f"scores out of range: {scores.min():g} to {scores.max():g}, not {lowest:g} to {highest:g}")
    return scores
