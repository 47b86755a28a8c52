"""Rotary positions of the decoder's tokens.

Shapes: T tokens, d head width; frequency f turns one pair of features of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsmoe_vl.config.model import ModelConfig
from dsmoe_vl.config.rope import RopeScalingConfig
from dsmoe_vl.model.layers import frequencies


class Rotary:
    """The rotary embedding (Su et al. 2021, eq. 34) that a recipe describes.

    With `rope_sections` (interleaved MRoPE, as Qwen3-VL has it) frequencies 1, 4, 7, ... turn with the row of a token
    and 2, 5, 8, ... with its column, as many as the second and third section say; all others turn with its time.

    With `rope_scaling` frequencies are lower, see `scaled`. "yarn" also makes cosines and sines larger (Peng et al.
    2023, section 3.4), so that attention is sharper.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.base, self.pairs = model.rope_base, model.width_of_head // 2
        self.scaling = model.rope_scaling
        self.magnitude = 1.0
        if self.scaling.kind == "yarn":
            self.magnitude = self.scaling.attention_factor or 0.1 * math.log(self.scaling.factor) + 1
        self.by_place = bool(model.rope_sections)
        self._axes = [0] * self.pairs
        for axis, count in enumerate(model.rope_sections[1:], 1):
            self._axes[axis : 3 * count : 3] = [axis] * count

    def __call__(self, positions: Tensor) -> Tensor:
        """positions int64 [T], or places [T, 3] of time, row and column -> complex64 [T, 1, d / 2]."""
        turns = self.frequencies(positions.device)
        if positions.dim() == 2:
            axes = torch.tensor(self._axes, device=positions.device)
            angles = positions.float().index_select(1, axes) * turns
        else:
            angles = positions.float().unsqueeze(-1) * turns
        return torch.polar(torch.full_like(angles, self.magnitude), angles).unsqueeze(1)

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians a position: float32 [d / 2]."""
        return scaled(frequencies(self.pairs, self.base, device), self.base, self.scaling)


def scaled(found: Tensor, base: float, scaling: RopeScalingConfig) -> Tensor:
    """The frequencies of a longer context, [d / 2].

    - "linear" (Chen et al. 2023, section 3.2): all are divided by the factor.
    - "llama3" (Llama 3.1): those with few turns in the original context are, those with many are not, and between the
      two the share is linear in the turns.
    - "yarn" (Peng et al. 2023, section 3.2): likewise, and the share is linear in the number of the frequency.
    """
    if scaling.kind == "none":
        return found
    if scaling.kind == "linear":
        return found / scaling.factor
    kept = _kept_llama3(found, scaling) if scaling.kind == "llama3" else _kept_yarn(found, base, scaling)
    return found * kept + found / scaling.factor * (1 - kept)


def _kept_llama3(found: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """The share of each frequency that stays as it is: [d / 2]."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_length * found / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_yarn(found: Tensor, base: float, scaling: RopeScalingConfig) -> Tensor:
    """As `_kept_llama3`."""
    count = len(found)

    def number(turns: float) -> float:
        """Of the frequency with so many turns in the original context."""
        return count * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(base)

    first, last = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    numbers = torch.arange(count, dtype=torch.float32, device=found.device)
    return 1 - ((numbers - first) / (last - first if last != first else 1e-3)).clamp(0, 1)
