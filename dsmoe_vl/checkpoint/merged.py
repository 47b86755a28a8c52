"""The weights of a run as a model without adapters has them: what an export writes.

Each matrix becomes W + (alpha / r) B A (Hu et al. 2021, section 4.1), computed in float32 and rounded to the type of W
once. In bfloat16 that rounding may take a part of B A away, so inference on a run keeps the adapters apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.parts import adapters_of, is_adapter
from dsmoe_vl.config.recipe import LoraConfig, Recipe


@dataclass(frozen=True)
class MergedWeights(WeightsFile):
    """A `WeightsFile` without adapters: its whole tensors (`read`, `load`) have them merged in. `scale`: alpha / r."""

    scale: float

    @cached_property
    def _stored(self) -> WeightsFile:
        return WeightsFile(self.folder)

    @cached_property
    def places(self) -> dict[str, str]:
        """The file of each tensor that is no adapter."""
        return {name: file for name, file in self._stored.places.items() if not is_adapter(name)}

    def read(self, stored: str) -> Tensor:
        """A stored tensor, merged."""
        value = super().read(stored)
        first, second = adapters_of(stored)
        if first not in self._stored.places:
            return value
        low, high = self._stored.read(first).float(), self._stored.read(second).float()
        return (value.float() + self.scale * (high @ low)).to(value.dtype)


def merged_weights(folder: Path, recipe: Recipe) -> WeightsFile:
    """The weights of a checkpoint without adapters."""
    return MergedWeights(folder, recipe.lora.scale) if recipe.lora.rank else WeightsFile(folder)


def merged_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the model that these weights are of."""
    return replace(recipe, lora=LoraConfig())
