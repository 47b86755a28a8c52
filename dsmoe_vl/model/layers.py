"""Layers used by both the vision encoder and the decoder.

Shapes: T tokens (or patches), D width, H heads, d head width, F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.cpu_kernels.operators import has_kernels, rms_norm, swiglu

IDENTITY = "identity"  # in a module's OWN_START, see `init.py`: of a square matrix


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019, eq. 4), with a weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if has_kernels(x):
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class NormOverHeads(RMSNorm):
    """RMSNorm over the features of all heads together, [T, H, d] -> [T, H, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)).view_as(x)


class SwiGLU(nn.Module):
    """Dense feed-forward `w2(silu(w1 x) * w3 x)` (Shazeer 2020, section 2); w1 and w3 are stored as one matrix."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if has_kernels(gate_up):
            return self.down(swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GatedSwiGLU(SwiGLU):
    """A SwiGLU times `sigmoid(w x)`, one number a token."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__(width, hidden_width)
        self.gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate(x).sigmoid()


class GELUFeedForward(nn.Module):
    """Feed-forward `w2 gelu(w1 x)` with biases; with the exact GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden_width)
        self.down = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def activation(self, x: Tensor) -> Tensor:
        """Element by element."""
        return F.gelu(x)


class TanhGELUFeedForward(GELUFeedForward):
    """With the approximation by tanh."""

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class QuickGELUFeedForward(GELUFeedForward):
    """With the approximation by a sigmoid, as CLIP has it."""

    def activation(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


# By the name in `VisionConfig.ffn`.
GELU_KINDS = {"gelu": GELUFeedForward, "gelu_tanh": TanhGELUFeedForward, "quick_gelu": QuickGELUFeedForward}


class Scale(nn.Module):
    """A learned factor per feature (LayerScale, Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def rotary_2d(positions: Tensor, head_width: int, base: float = 100.0) -> Tensor:
    """Rotary embedding of a grid: the first half of the pairs rotates with the row, the second with the column.

    positions int64 [T, 2] -> complex64 [T, 1, d / 2]. The base is small because a grid has tens of rows, not thousands.
    """
    turns = frequencies(head_width // 4, base, positions.device)
    angles = (positions.float().unsqueeze(-1) * turns).flatten(1)
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)


def frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """Radians a position of each pair of features, from one on: float32 [count]."""
    return base ** (-torch.arange(count, dtype=torch.float32, device=device) / count)
