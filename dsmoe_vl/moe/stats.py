"""What a MoE layer tells about its routing: returned values, never attributes, so that recomputation in activation
checkpointing and evaluation passes cannot count twice.

Shapes: T tokens, E experts, K experts a token, N MoE layers, J tasks, M modalities. Padding counts nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsmoe_vl.moe.router import Routing


class RouterStats(NamedTuple):
    """Sums over real tokens, of one layer or (with a leading N) of all layers. They add up over micro-steps, ranks."""

    load: Tensor  # float32 [(N,) J, M, E]: assignments; no gradient
    probability_sum: Tensor  # float32 [(N,) E], differentiable
    z_sum: Tensor  # float32 [(N,)]: squared log-partition, differentiable
    entropy_sum: Tensor  # float32 [(N,)], nats; no gradient

    @staticmethod
    def of(
        routing: Routing, task_ids: Tensor, modality_ids: Tensor, real: Tensor, tasks: int, modalities: int
    ) -> RouterStats:
        """Statistics of one layer. task_ids, modality_ids int64 [T]; real bool [T]."""
        weight = real.to(torch.float32)
        expert_count = routing.logits.shape[-1]
        with torch.no_grad():
            cell = (task_ids * modalities + modality_ids).unsqueeze(-1) * expert_count + routing.experts
            load = weight.new_zeros(tasks * modalities * expert_count)
            load.scatter_add_(0, cell.flatten(), weight.repeat_interleave(routing.experts.shape[-1]))
            entropy = -torch.special.xlogy(routing.probabilities, routing.probabilities).sum(-1)
        return RouterStats(
            load=load.view(tasks, modalities, expert_count),
            probability_sum=weight @ routing.probabilities,
            z_sum=weight @ routing.logits.logsumexp(dim=-1).square(),
            entropy_sum=weight @ entropy,
        )

    @staticmethod
    def stack(layers: list[RouterStats]) -> RouterStats | None:
        """One object for all layers; None for a model without MoE layers."""
        if not layers:
            return None
        return RouterStats(
            load=torch.stack([s.load for s in layers]),
            probability_sum=torch.stack([s.probability_sum for s in layers]),
            z_sum=torch.stack([s.z_sum for s in layers]),
            entropy_sum=torch.stack([s.entropy_sum for s in layers]),
        )
