"""How probable a model finds given captions: their cross entropies, as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dsmoe_vl.data.segment import IGNORE, Segment
from dsmoe_vl.inference.generate import prompt_batch, unspeakable
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.tasks.language import followed_by


class TextLoss(NamedTuple):
    """Of one text: the sum of its tokens' cross entropies and that of the end token, in nats; and whether it is the
    text that greedy decoding writes."""

    loss: float
    is_greedy: bool


@torch.inference_mode()
def text_losses(trained: TrainedModel, prompts: Sequence[Segment], texts: Sequence[str]) -> list[TextLoss]:
    """The loss of each text after its prompt, in one forward."""
    tokenizer = trained.tokenizer
    segments = [
        followed_by(prompt, tokenizer.encode(text), tokenizer.eos) for prompt, text in zip(prompts, texts, strict=True)
    ]
    batch = prompt_batch(trained, segments)
    hidden, _ = trained.model(batch)
    rows = (batch.labels != IGNORE).nonzero().squeeze(1)
    targets = batch.labels.index_select(0, rows)  # int64 [X], of all texts
    logits = trained.model.head(hidden.index_select(0, rows)).float()  # [X, V]
    losses = F.cross_entropy(logits, targets, reduction="none")
    best = logits.masked_fill(unspeakable(trained), float("-inf")).argmax(-1) == targets
    counts = [int((segment.labels != IGNORE).sum()) for segment in segments]
    return [
        TextLoss(float(loss.double().sum()), bool(right.all()))
        for loss, right in zip(losses.split(counts), best.split(counts), strict=True)
    ]
