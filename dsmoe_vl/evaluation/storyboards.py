"""Videos for the report: sampled frames, their importance, and the key frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.decode import sampled_frames
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.evaluation.examples import SMALL_SIDE, thumbnail
from dsmoe_vl.inference.summarize import VideoSummary
from dsmoe_vl.report.content import Storyboard
from dsmoe_vl.tasks.video_summary import annotated_curves

_FRAMES = 12  # shown, at most


def storyboard(sample: Sample, summary: VideoSummary, scores: dict[str, float], data: DataConfig) -> Storyboard:
    """`data`: the recipe's settings, for the same frames as the model's. Raises DataError if they cannot be read."""
    curves, duration = annotated_curves(sample)
    keys = summary.key_frames()
    shown = set(_shown_frames(keys, summary.importance))
    frames = {
        number: thumbnail(pixels, SMALL_SIDE)
        for number, (_, pixels) in enumerate(sampled_frames(sample, data))
        if number in shown
    }
    return Storyboard(
        key=sample.key,
        seconds=summary.seconds,
        importance=summary.importance,
        annotated=curves.mean(axis=0, dtype=np.float32),
        annotators=len(curves),
        duration_seconds=duration,
        frames=frames,
        key_frames=keys,
        generated=summary.text,
        reference=contents_of(sample).summary,
        scores=scores,
    )


def _shown_frames(keys: Sequence[int], importance: np.ndarray) -> list[int]:
    """Indices of the frames to show: the most important key frames, then evenly spaced others if there is room."""
    shown = sorted(keys, key=lambda number: -float(importance[number]))[:_FRAMES]
    others = sorted(set(range(len(importance))) - set(shown))
    room = min(_FRAMES - len(shown), len(others))
    steps = np.linspace(0, len(others) - 1, room).round().astype(int)
    return sorted([*shown, *(others[step] for step in steps)])
