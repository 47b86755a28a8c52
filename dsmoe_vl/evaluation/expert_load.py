"""Counts tokens per expert during an evaluation. Shapes as in `moe/stats.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.report.content import ExpertLoad


class LoadCounter:
    """Sums `RouterStats.load` of a model's layers inside `watching`, generated tokens included."""

    def __init__(self, recipe: Recipe) -> None:
        self._experts = [int(count) for count in experts_of_layers(recipe)]
        self._first = recipe.moe.first_dense_layers
        self._sums: dict[int, Tensor] = {}  # by layer, on the model's device, to avoid synchronisation

    @contextmanager
    def watching(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Count the load of all decoder layers of a model inside the `with`."""

        def count(number: int, output: tuple[Tensor, RouterStats | None]) -> None:
            stats = output[1]
            if stats is not None:
                with torch.inference_mode():
                    load = stats.load.double()
                    self._sums[number] = self._sums[number] + load if number in self._sums else load

        def hook(number: int) -> Any:
            return lambda module, inputs, output: count(number, output)

        hooks = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def load(self) -> ExpertLoad | None:
        """The counted load; None without sparse layers or without a forward."""
        numbers = sorted(self._sums)
        if not numbers:
            return None
        sums = [self._sums[number].cpu().numpy() for number in numbers]
        widest = max(part.shape[-1] for part in sums)
        padded = [np.pad(part, ((0, 0), (0, 0), (0, widest - part.shape[-1]))) for part in sums]
        return ExpertLoad(np.stack(padded), numbers, [self._experts[number - self._first] for number in numbers])


def total_load(of_ranks: Iterable[ExpertLoad | None]) -> ExpertLoad | None:
    """Sum over ranks; a rank without samples has None."""
    counted = [load for load in of_ranks if load is not None]
    if not counted:
        return None
    return ExpertLoad(np.sum([load.load for load in counted], axis=0), counted[0].layers, counted[0].experts)
