"""Retrieval embeddings from the decoder's hidden states.

Shapes: T tokens, S segments, n pairs, D width, W width of an embedding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.config.task_table import RetrievalConfig

_MAX_SCALE = 100.0  # CLIP's bound on 1 / temperature
# Initial scale and bias, by loss.
_START = {
    "info_nce": (1 / 0.07, 0.0),  # Radford et al. 2021, section 2.5
    "sigmoid": (10.0, -10.0),  # Zhai et al. 2023, section 3.3
}


class RetrievalEmbeddings(NamedTuple):
    """Unit vectors of both sides, fp32 [n, W], and scale and bias of the similarity, fp32 [1]."""

    media: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


class RetrievalHead(nn.Module):
    """Projections of both sides, and the learned temperature (Radford et al. 2021, section 2.3).

    With `whiten`, states are whitened first, in fp32: what all states of a side have in common is removed, and
    their differences get one size. Both matrices are measured before training (`doctor/whitening.py`) and stay fixed.
    """

    def __init__(self, width: int, settings: RetrievalConfig) -> None:
        super().__init__()
        embedding_width, (initial_scale, initial_bias) = settings.embedding_width, _START[settings.loss]
        inner = embedding_width if settings.whiten else width
        self.media = nn.Linear(inner, embedding_width, bias=False)
        self.text = nn.Linear(inner, embedding_width, bias=False)
        self.media_whitening = nn.Linear(width, embedding_width) if settings.whiten else None
        self.text_whitening = nn.Linear(width, embedding_width) if settings.whiten else None
        self.pooling = settings.pooling
        self.OWN_START = {"log_scale": math.log(initial_scale), "bias": initial_bias}  # for `model/init.py`
        self.log_scale = nn.Parameter(torch.tensor([self.OWN_START["log_scale"]]))
        self.bias = nn.Parameter(torch.tensor([self.OWN_START["bias"]]))  # used by the sigmoid loss

    def forward(self, hidden: Tensor, media: Tensor, text: Tensor, cu_segments: Tensor) -> RetrievalEmbeddings:
        """hidden [T, D]; media, text: the last tokens of the segments to embed, int64 [n]; cu_segments int32 [S + 1]:
        cumulative lengths of all segments; the last is T."""
        of_media, of_text = self.states(hidden, media, text, cu_segments)
        return RetrievalEmbeddings(
            F.normalize(self.media(_whitened(of_media, self.media_whitening)).float(), dim=-1),
            F.normalize(self.text(_whitened(of_text, self.text_whitening)).float(), dim=-1),
            self.log_scale.float().exp().clamp(max=_MAX_SCALE),
            self.bias.float(),
        )

    def states(self, hidden: Tensor, media: Tensor, text: Tensor, cu_segments: Tensor) -> tuple[Tensor, Tensor]:
        """What stands for the segments of both sides, [n, D] each, from what `forward` gets."""
        if self.pooling == "last":
            return hidden.index_select(0, media), hidden.index_select(0, text)
        means = segment_means(hidden, cu_segments)
        first, second = (means.index_select(0, _segment_of(last, cu_segments)) for last in (media, text))
        return first.type_as(hidden), second.type_as(hidden)


def _whitened(states: Tensor, whitening: nn.Linear | None) -> Tensor:
    """In fp32, since two large numbers cancel: [n, D] -> [n, W]; as they are without."""
    if whitening is None:
        return states
    return F.linear(states.float(), whitening.weight.float(), whitening.bias.float()).type_as(states)


def segment_means(hidden: Tensor, cu_segments: Tensor) -> Tensor:
    """The mean state of each segment, in fp32: hidden [T, D], cu_segments int32 [S + 1] -> [S, D]."""
    lengths = cu_segments.diff()
    segments = _segment_of(torch.arange(len(hidden), device=hidden.device), cu_segments)
    sums = hidden.new_zeros(len(lengths), hidden.shape[-1], dtype=torch.float32)
    return sums.index_add(0, segments, hidden.float()) / lengths.unsqueeze(-1)


def _segment_of(tokens: Tensor, cu_segments: Tensor) -> Tensor:
    """The segment of each token, int64."""
    return torch.searchsorted(cu_segments[1:], tokens.int(), right=True)
