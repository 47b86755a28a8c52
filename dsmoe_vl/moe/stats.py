"""Routing statistics of a MoE layer. They are return values, never attributes, so that recomputation in activation
checkpointing and evaluation cannot count twice.

Shapes: T tokens, E experts, K experts per token, N MoE layers, J tasks, M modalities, B bins. Padding is not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_vl.moe.balance import entropy
from dsmoe_vl.moe.router import Routing

LIVE_SHARE = 0.01  # an expert with less than this fraction of an even share is dead
GATE_BINS = 20  # bins of the histogram of gates, from 0 to 1


class RouterStats(NamedTuple):
    """Sums over real tokens, of one layer or (with a leading N) of all layers. Add them over micro-steps and ranks."""

    load: Tensor  # float32 [(N,) J, M, E]: assignments; no gradient
    probability_sum: Tensor  # float32 [(N,) J, M, E], differentiable
    z_sum: Tensor  # float32 [(N,)]: squared log-partition, differentiable
    entropy_sum: Tensor  # float32 [(N,) M], nats, differentiable
    dropped: Tensor  # float32 [(N,)]: assignments that no expert computed; no gradient
    gates: Tensor  # float32 [(N,) B]: histogram of the gates of computed assignments; no gradient

    @staticmethod
    def of(
        routing: Routing,
        task_ids: Tensor,
        modality_ids: Tensor,
        real: Tensor,
        tasks: int,
        modalities: int,
        computed: Tensor | None = None,
    ) -> RouterStats:
        """Statistics of one layer. task_ids, modality_ids int64 [T]; real bool [T]; computed bool [T, K]: assignments
        of real tokens that an expert computes, by default all."""
        weight = real.to(torch.float32)
        top_k = routing.experts.shape[-1]
        expert_count = routing.logits.shape[-1]
        cell = task_ids * modalities + modality_ids
        with torch.no_grad():
            slot = cell.unsqueeze(-1) * expert_count + routing.experts
            load = weight.new_zeros(tasks * modalities * expert_count)
            counted = weight.repeat_interleave(top_k) if computed is None else computed.flatten().type_as(weight)
            load.scatter_add_(0, slot.flatten(), counted)
            bins = (routing.gates * GATE_BINS).long().clamp(0, GATE_BINS - 1)
            gates = weight.new_zeros(GATE_BINS).scatter_add_(0, bins.flatten(), counted)
            of_cell = (torch.arange(tasks * modalities, device=cell.device).unsqueeze(1) == cell) * weight  # [J * M, T]
            of_modality = of_cell.view(tasks, modalities, -1).sum(0)
        shape = (tasks, modalities, expert_count)
        return RouterStats(
            load=load.view(shape),
            probability_sum=(of_cell @ routing.probabilities).view(shape),
            z_sum=weight @ routing.logits.logsumexp(dim=-1).square(),
            entropy_sum=of_modality @ entropy(routing.probabilities),
            dropped=weight.sum() * top_k - load.sum(),
            gates=gates,
        )

    @staticmethod
    def stack(layers: list[RouterStats]) -> RouterStats | None:
        """The statistics of all layers; None for a model without MoE layers. Layers with fewer experts than others are
        padded with columns of 0."""
        if not layers:
            return None
        widest = max(layer.load.shape[-1] for layer in layers)
        layers = [
            layer._replace(
                load=F.pad(layer.load, (0, widest - layer.load.shape[-1])),
                probability_sum=F.pad(layer.probability_sum, (0, widest - layer.load.shape[-1])),
            )
            for layer in layers
        ]
        return RouterStats(*(torch.stack(values) for values in zip(*layers, strict=True)))


class RoutingSums(NamedTuple):
    """Sums over the real tokens of one or more steps, over all ranks, without gradient."""

    load: Tensor  # [N, J, M, E] assignments
    entropy: Tensor  # [N, M], nats
    dropped: Tensor  # [N] assignments
    gates: Tensor  # [N, B] assignments
    violation: Tensor  # [N] the mean `max_violation` of a rank's micro-batches, summed over steps


def max_violation(load: Tensor, experts: Tensor) -> Tensor:
    """The busiest expert's load divided by an even share, minus 1 (Wang et al. 2024, eq. 4): 0 if routing is even.

    load [..., N, E]; experts [N], E of each layer -> [..., N].
    """
    return load.amax(-1) / load.sum(-1).clamp(min=1) * experts - 1


def grouped(sums: Tensor, over: str) -> Tensor:
    """Sums [N, J, M, E] grouped over "all" tokens, by "task", or by "modality": [N, G, E]."""
    if over == "all":
        return sums.sum((1, 2)).unsqueeze(1)
    return sums.sum(2 if over == "task" else 1)
