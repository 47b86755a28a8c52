"""Scores for TensorBoard, beside the curves of the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


def write_scalars(directory: Path, step: int, scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """`eval/TASK/METRIC` at an optimizer step, a folder of event files for each source.

    A folder of their own, because a training of the same run may still be writing its own event file, of which
    TensorBoard follows only the newest in a folder.

    Args:
        scores: by source (a folder of shards, or its URL), task and metric. Sources are called by the last part.
    """
    names: set[str] = set()
    for source, tasks in scores.items():
        name = base = source.rstrip("/").rpartition("/")[2] or "data"
        number = 1
        while name in names:
            number += 1
            name = f"{base}_{number}"
        names.add(name)
        with SummaryWriter(str(directory / name)) as writer:
            for task, values in tasks.items():
                for metric, value in values.items():
                    writer.add_scalar(f"eval/{task}/{metric}", value, step)
