"""What the tasks read from the decoder's hidden states, beside the language head.

Shapes: n retrieval pairs, F frames, D width, W width of a retrieval embedding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_SCALE = 100.0  # CLIP's bound on 1 / temperature
# Scale and bias at the start.
INFO_NCE_START = (1 / 0.07, 0.0)  # Radford et al. 2021, section 2.5
SIGMOID_START = (10.0, -10.0)  # Zhai et al. 2023, section 3.3


class RetrievalEmbeddings(NamedTuple):
    """Unit vectors of the two sides, fp32 [n, W], and the similarity's scale and bias, fp32 [1]."""

    media: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


class RetrievalHead(nn.Module):
    """Projections of the two embedding tokens, and the learned temperature (Radford et al. 2021, section 2.3)."""

    def __init__(self, width: int, embedding_width: int, initial_scale: float, initial_bias: float) -> None:
        super().__init__()
        self.media = nn.Linear(width, embedding_width, bias=False)
        self.text = nn.Linear(width, embedding_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial_scale)]))
        self.bias = nn.Parameter(torch.tensor([initial_bias]))  # of the sigmoid loss

    def forward(self, media: Tensor, text: Tensor) -> RetrievalEmbeddings:
        """Hidden states [n, D] of the pictures' and of the texts' embedding tokens."""
        return RetrievalEmbeddings(
            F.normalize(self.media(media).float(), dim=-1),
            F.normalize(self.text(text).float(), dim=-1),
            self.log_scale.float().exp().clamp(max=_MAX_SCALE),
            self.bias.float(),
        )


class ImportanceHead(nn.Module):
    """How much each frame matters to a summary, read at its frame token: hidden [F, D] -> logits, fp32 [F]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.score(hidden).float().squeeze(-1)
