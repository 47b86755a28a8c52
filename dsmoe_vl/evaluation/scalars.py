"""Writes scores to TensorBoard, beside the training curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dsmoe_vl.files import distinct_names


def write_scalars(directory: Path, step: int, scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Write `eval/TASK/METRIC` at an optimizer step, one folder of event files per source.

    Separate folders, because training of the same run may still write its own event file, and TensorBoard follows only
    the newest one in a folder.

    Args:
        scores: by source (a folder of shards, or its URL), task and metric. A source is named by its last part.
    """
    names = distinct_names(source.rstrip("/").rpartition("/")[2] or "data" for source in scores)
    for name, tasks in zip(names, scores.values(), strict=True):
        with SummaryWriter(str(directory / name)) as writer:
            for task, values in tasks.items():
                for metric, value in values.items():
                    writer.add_scalar(f"eval/{task}/{metric}", value, step)
