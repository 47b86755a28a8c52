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
from dsmoe_vl.model.layers import IDENTITY

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


class Projection(nn.Linear):
    """Of one side: states [n, D] -> [n, W].

    With `align`, a matrix and a bias come first, in fp32, since two large numbers cancel: measured before training
    (`doctor/alignment.py`) and never trained. The trained matrix starts as the identity then.
    """

    def __init__(self, width: int, embedding_width: int, align: bool) -> None:
        super().__init__(embedding_width if align else width, embedding_width, bias=False)
        self.alignment = nn.Linear(width, embedding_width) if align else None
        self.OWN_START = {"weight": IDENTITY} if align else {}  # for `model/init.py`

    def forward(self, states: Tensor) -> Tensor:
        """states [n, D] -> [n, W]."""
        if self.alignment is not None:
            matrix, bias = self.alignment.weight.float(), self.alignment.bias.float()
            states = F.linear(states.float(), matrix, bias).type_as(states)
        return super().forward(states)


class RetrievalHead(nn.Module):
    """Projections of both sides, and the learned temperature (Radford et al. 2021, section 2.3)."""

    def __init__(self, width: int, settings: RetrievalConfig) -> None:
        super().__init__()
        embedding_width, (initial_scale, initial_bias) = settings.embedding_width, _START[settings.loss]
        self.media = Projection(width, embedding_width, settings.align)
        self.text = Projection(width, embedding_width, settings.align)
        self.pooling = settings.pooling
        self.OWN_START = {"log_scale": math.log(initial_scale), "bias": initial_bias}  # for `model/init.py`
        self.log_scale = nn.Parameter(torch.tensor([self.OWN_START["log_scale"]]))
        self.bias = nn.Parameter(torch.tensor([self.OWN_START["bias"]]))  # used by the sigmoid loss

    def forward(self, hidden: Tensor, media: Tensor, text: Tensor, cu_segments: Tensor) -> RetrievalEmbeddings:
        """hidden [T, D]; media, text: the last tokens of the segments to embed, int64 [n]; cu_segments int32 [S + 1]:
        cumulative lengths of all segments; the last is T."""
        of_media, of_text = self.states(hidden, media, text, cu_segments)
        return RetrievalEmbeddings(
            F.normalize(self.media(of_media).float(), dim=-1),
            F.normalize(self.text(of_text).float(), dim=-1),
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


def segment_means(hidden: Tensor, cu_segments: Tensor) -> Tensor:
    """The mean state of each segment, in fp32: hidden [T, D], cu_segments int32 [S + 1] -> [S, D]."""
    lengths = cu_segments.diff()
    segments = _segment_of(torch.arange(len(hidden), device=hidden.device), cu_segments)
    sums = hidden.new_zeros(len(lengths), hidden.shape[-1], dtype=torch.float32)
    return sums.index_add(0, segments, hidden.float()) / lengths.unsqueeze(-1)


def _segment_of(tokens: Tensor, cu_segments: Tensor) -> Tensor:
    """The segment of each token, int64."""
    return torch.searchsorted(cu_segments[1:], tokens.int(), right=True)
