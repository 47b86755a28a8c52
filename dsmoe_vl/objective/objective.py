"""`L = sum_i w_i L_i + a_bal sum_l L_bal + a_z sum_l L_z` with every term normalised by its *global* count.

A term's sum over this rank's micro-step is divided by the number of its targets in the whole optimizer step, over all
ranks and micro-steps. The parts then add up to the same loss, and the same gradients, for any split into ranks and
accumulation steps. Shapes: N MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_vl.config.plan import RunPlan
from dsmoe_vl.moe.balance import load_balance_loss, router_z_loss
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.tasks.task import TaskOutput


@dataclass(frozen=True)
class StepLoss:
    """`scalar` is for the engine's backward; `terms` are this part's shares of the logged values, without gradient."""

    scalar: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Turns the sums of one micro-step into one scalar."""

    def __init__(self, plan: RunPlan) -> None:
        recipe = plan.recipe
        self.weights = {"caption": recipe.tasks.caption.weight}
        self.balance_weight, self.z_weight = recipe.moe.balance_weight, recipe.moe.z_weight
        # The engine averages gradients over ranks and over micro-steps; our parts are to be added up.
        self.parts = plan.dp_size * plan.accumulation

    def __call__(
        self, output: TaskOutput, stats: RouterStats | None, counts: dict[str, int], load_fraction: Tensor | None
    ) -> StepLoss:
        """counts: global targets per term and real "tokens" of the optimizer step; load_fraction [N, E] of the last."""
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        for term, loss_sum in output.loss_sums.items():
            parts[f"loss_{term}"] = loss_sum / max(counts.get(term, 0), 1)
            weighted = self.weights[term] * parts[f"loss_{term}"]
            total = weighted if total is None else total + weighted
        assert total is not None, "a model without tasks"
        if stats is not None and load_fraction is not None:
            tokens = max(counts["tokens"], 1)
            if self.balance_weight:
                parts["balance_loss"] = load_balance_loss(stats.probability_sum, load_fraction, tokens)
                total = total + self.balance_weight * parts["balance_loss"]
            if self.z_weight:
                parts["z_loss"] = router_z_loss(stats.z_sum, tokens)
                total = total + self.z_weight * parts["z_loss"]
        parts["loss"] = total
        return StepLoss(total * self.parts, {name: value.detach() for name, value in parts.items()})


def uniform_load(layers: int, experts: int, device: torch.device | str) -> Tensor:
    """The load fractions before the first step: [N, E], all 1 / E."""
    return torch.full((layers, experts), 1.0 / experts, device=device)
