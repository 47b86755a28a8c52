"""`L = sum_i w_i L_i + sum_j a_j sum_l B_j(l)`, every term normalised by its *global* count.

A linear term is the sum over this rank's micro-step, divided by the number of its targets in the whole optimizer step
(all ranks, all micro-steps). So loss and gradients are the same for any split into ranks and accumulation steps.
Coupled balancing terms are functions of sums over the global micro-step, averaged over micro-steps.

Shapes: N MoE layers, J tasks, M modalities, E experts, G groups of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_vl.data.segment import TOKENS_OF
from dsmoe_vl.moe.balance import (
    global_entropy_loss,
    load_balance_loss,
    local_entropy_loss,
    mutual_information,
    router_z_loss,
)
from dsmoe_vl.moe.stats import RouterStats, grouped
from dsmoe_vl.objective.task_weights import TaskWeights
from dsmoe_vl.parallel.collectives import summed_over_ranks
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.tasks.task import TaskOutput


@dataclass(frozen=True)
class StepLoss:
    """`scalar` is for the engine's backward; `terms` are this micro-step's shares of the logged values, detached."""

    scalar: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Computes the scalar loss from the sums of one micro-step."""

    def __init__(self, plan: RunPlan, device: torch.device | str = "cpu") -> None:
        """device: of the sums."""
        self.moe, self.task_weights = plan.recipe.moe, TaskWeights(plan.recipe, device)
        self.ranks, self.accumulation = plan.dp_size, plan.accumulation
        self.experts = torch.tensor(experts_of_layers(plan.recipe)).view(-1, 1, 1)

    def __call__(
        self, output: TaskOutput, stats: RouterStats | None, counts: dict[str, int], load_fraction: Tensor | None
    ) -> StepLoss:
        """counts: global COUNTS of the optimizer step; load_fraction [N, G, E] of the previous one, by
        moe.balance_over.

        Collective if the recipe has coupled terms.
        """
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        for term, loss_sum in output.loss_sums.items():
            parts[f"loss_{term}"] = loss_sum / max(counts[term], 1)
            weighted = self.task_weights.of(term) * parts[f"loss_{term}"]
            total = weighted if total is None else total + weighted
        assert total is not None, "a model without tasks"
        logged = total
        if stats is not None and load_fraction is not None:
            for name, weight, part in self.linear(stats, counts, load_fraction):
                parts[name] = part
                total, logged = total + weight * part, logged + weight * part
            for name, weight, value in self.coupled(stats):
                # Every rank computes the whole value, and the gradient for its own tokens only.
                parts[name] = value / self.ranks
                total, logged = total + weight * value, logged + weight * parts[name]
        parts["loss"] = logged
        # The engine averages gradients over ranks and micro-steps, but our shares must be summed.
        scalar = total * (self.ranks * self.accumulation)
        return StepLoss(scalar, {name: value.detach() for name, value in parts.items()})

    def linear(
        self, stats: RouterStats, counts: dict[str, int], load_fraction: Tensor
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Name, coefficient and this micro-step's share of every enabled linear balancing term."""
        moe, tokens = self.moe, max(counts["tokens"], 1)
        if moe.balance_weight:
            sums = grouped(stats.probability_sum, moe.balance_over)
            experts = self.experts.to(sums.device)
            yield "balance_loss", moe.balance_weight, load_balance_loss(sums, load_fraction, tokens, experts)
        if moe.z_weight:
            yield "z_loss", moe.z_weight, router_z_loss(stats.z_sum, tokens)
        if moe.local_entropy_weight:
            names = list(TOKENS_OF.values())[: stats.entropy_sum.shape[-1]]  # speech only if the model hears
            by_modality = [float(counts[name]) for name in names]
            divisor = torch.tensor(by_modality, device=stats.entropy_sum.device)
            yield "local_entropy_loss", moe.local_entropy_weight, local_entropy_loss(stats.entropy_sum, divisor)

    def coupled(self, stats: RouterStats) -> Iterator[tuple[str, float, Tensor]]:
        """Name, coefficient and value of every enabled coupled term, as a share of the optimizer step."""
        moe = self.moe
        if not (moe.global_entropy_weight or moe.mutual_information_weight):
            return
        sums = summed_over_ranks(stats.probability_sum)
        if moe.global_entropy_weight:
            by_modality = grouped(sums, "modality")
            tokens = by_modality[0].detach().sum(-1).round()  # a token's probabilities sum to 1
            value = global_entropy_loss(by_modality, tokens, math.log(moe.global_entropy_experts))
            yield "global_entropy_loss", moe.global_entropy_weight, value / self.accumulation
        if moe.mutual_information_weight:
            value = -mutual_information(grouped(sums, "task")).sum() / self.accumulation
            yield "mutual_information_loss", moe.mutual_information_weight, value


def uniform_load(experts: Sequence[int], groups: int, device: torch.device | str) -> Tensor:
    """The load fractions before the first step, from E of every layer: [N, G, largest E], 1 / E for each expert."""
    shares = [[1.0 / count] * count + [0.0] * (max(experts) - count) for count in experts]
    return torch.tensor(shares, device=device).unsqueeze(1).repeat(1, groups, 1)


def load_fractions(load: Tensor, over: str, even: Tensor | None = None) -> Tensor:
    """Each expert's share of the assignments of its group, for the next step: load [N, J, M, E] -> [N, G, E].

    A group without tokens gets its value from `even` [N, G, E], by default 1 / E.
    """
    assignments = grouped(load, over)
    total = assignments.sum(-1, keepdim=True)
    return torch.where(total > 0, assignments / total.clamp(min=1), 1.0 / load.shape[-1] if even is None else even)
