"""LoRA (Hu et al. 2021, section 4.1): beside a matrix W [out, in] two thin ones, h = W x + (alpha / r) B A x.

A [r, in] starts as other matrices do, B [out, r] at zero, so the model starts as it is without them. A layer with
adapters is a subclass that replaces it, so the layers know nothing of them. W + (alpha / r) B A is never made in
training: two thin products cost r (in + out) a row, and only rows that go to an expert pay for its adapters.

Shapes: R rows sorted by expert, E experts, r rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.config.parts import is_adapted
from dsmoe_vl.config.recipe import LoraConfig
from dsmoe_vl.moe.experts import Ends, Expert, Experts, grouped_linear
from dsmoe_vl.moe.grouped_bank import ROWS_OF_A_GROUP

_MATRICES = ("w1", "w2", "w3")
_START = {f"{name}_lora_b": 0.0 for name in _MATRICES}


class LoraLinear(nn.Linear):
    """A linear layer with adapters: x [..., in] -> [..., out]."""

    OWN_START: ClassVar = {"lora_b": 0.0}

    def __init__(self, source: nn.Linear, lora: LoraConfig) -> None:
        super().__init__(source.in_features, source.out_features, source.bias is not None)
        self.lora_a = nn.Parameter(torch.empty(lora.rank, source.in_features))
        self.lora_b = nn.Parameter(torch.empty(source.out_features, lora.rank))
        self.scale = lora.scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)


class LoraExpert(Expert):
    """One expert with adapters."""

    OWN_START: ClassVar = _START

    def __init__(self, source: Expert, lora: LoraConfig) -> None:
        super().__init__(*source.w2.shape)
        _add(self, lora.rank)
        self.scale = lora.scale

    def linear(self, name: str, x: Tensor) -> Tensor:
        first, second = _adapters(self, name)
        return super().linear(name, x) + F.linear(F.linear(x, first) * self.scale, second)


class LoraExperts(Experts):
    """Experts, each with adapters of its own: A [E, r, in], B [E, out, r]."""

    as_one_function: ClassVar = False
    OWN_START: ClassVar = _START

    def __init__(self, source: Experts, lora: LoraConfig) -> None:
        super().__init__(*source.w2.shape)
        _add(self, lora.rank)
        self.lora, self.scale = lora, lora.scale

    def linear(self, name: str, x: Tensor, ends: Ends) -> Tensor:
        first, second = _adapters(self, name)
        short = -first.shape[1] % ROWS_OF_A_GROUP
        if short and not isinstance(ends, list):  # a GPU's kernel wants rows of 16 bytes: zeros fill the rank up
            first, second = F.pad(first, (0, 0, 0, short)), F.pad(second, (0, short))
        low = grouped_linear(x, first, ends) * self.scale
        return super().linear(name, x, ends) + grouped_linear(low, second, ends)

    def single(self) -> LoraExpert:
        return LoraExpert(super().single(), self.lora)


def _add(module: Expert | Experts, rank: int) -> None:
    for name in _MATRICES:
        *stacked, rows, columns = getattr(module, name).shape
        module.register_parameter(f"{name}_lora_a", nn.Parameter(torch.empty(*stacked, rank, columns)))
        module.register_parameter(f"{name}_lora_b", nn.Parameter(torch.empty(*stacked, rows, rank)))


def _adapters(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    return getattr(module, f"{name}_lora_a"), getattr(module, f"{name}_lora_b")


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Replace the layers of a one-process model that have adapters, in place, before their values are set."""
    for name, module in list(model.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, nn.Linear) and is_adapted(f"{name}.weight", lora.adapted):
            new = LoraLinear(module, lora)
        elif isinstance(module, Experts) and is_adapted(f"{name}.w1", lora.adapted):
            new = LoraExperts(module, lora)
        elif isinstance(module, Expert) and is_adapted(f"{name}.w1", lora.adapted):
            new = LoraExpert(module, lora)
        if new is not None:
            model.set_submodule(name, new)
