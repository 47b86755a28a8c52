"""Shared by captioning and summarization: a target text after a prompt, and its language-model loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.segment import IGNORE, Modality, Segment
from dsmoe_vl.model.vlm import VisionLanguageModel


def followed_by(prompt: Segment, text: Sequence[int], end: int) -> Segment:
    """The prompt, then `text`. The last prompt token predicts the first text token, the last text token `end`."""
    labels = np.full(prompt.length + len(text), IGNORE, dtype=np.int32)
    labels[prompt.length - 1 :] = [*text, end]
    return replace(
        prompt,
        tokens=np.concatenate((prompt.tokens, np.asarray(text, dtype=np.int32))),
        labels=labels,
        modality=np.concatenate((prompt.modality, np.full(len(text), Modality.TEXT, dtype=np.int32))),
    )


def language_loss(model: VisionLanguageModel, hidden: Tensor, batch: Batch, task: int) -> Tensor:
    """Cross entropy summed over the targets of task number `task`: fp32 scalar, nats. hidden [T, D]."""
    # How many there are is known, so the host does not wait for the device to count them.
    count = next(batch.counts[term.name] for term in TASKS[task].terms if term.targets == "labels")
    mine = (batch.labels != IGNORE) & (batch.task_ids == task)
    rows = mine.nonzero_static(size=count).squeeze(1)
    return model.head(hidden.index_select(0, rows), batch.labels.index_select(0, rows))
