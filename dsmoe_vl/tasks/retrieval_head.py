"""Retrieval embeddings from the decoder's hidden states. Shapes: n pairs, D width, W width of an embedding."""

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
    """Projections of the two embedding tokens, and the learned temperature (Radford et al. 2021, section 2.3)."""

    OWN_START = ("log_scale", "bias")  # parameters that `initialise` does not change

    def __init__(self, width: int, settings: RetrievalConfig) -> None:
        super().__init__()
        embedding_width, (initial_scale, initial_bias) = settings.embedding_width, _START[settings.loss]
        self.media = nn.Linear(width, embedding_width, bias=False)
        self.text = nn.Linear(width, embedding_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial_scale)]))
        self.bias = nn.Parameter(torch.tensor([initial_bias]))  # used by the sigmoid loss

    def forward(self, media: Tensor, text: Tensor) -> RetrievalEmbeddings:
        """media, text [n, D]: hidden states of the embedding tokens."""
        return RetrievalEmbeddings(
            F.normalize(self.media(media).float(), dim=-1),
            F.normalize(self.text(text).float(), dim=-1),
            self.log_scale.float().exp().clamp(max=_MAX_SCALE),
            self.bias.float(),
        )
