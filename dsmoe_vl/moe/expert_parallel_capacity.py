"""The sparse feed-forward with expert capacity, over ranks: DeepSpeed's classic MoE layer with our router.

DeepSpeed provides the gating functions, which assign slots, the buffers, the equal-split all-to-all, the residual
branch, the process groups and the marks on expert parameters. The choice of experts, the gates and the statistics are
ours; `l_aux` is not used. `tests/unit/test_deepspeed_contract.py` checks the private names used here.

Shapes: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from deepspeed.comm.pg_utils import is_parallel
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import (
    TopKGate,
    gumbel_rsample,
    multiplicative_jitter,
    top1gating,
    top2gating,
    topkgating,
)
from torch import Tensor

from dsmoe_vl.moe.capacity_feed_forward import CapacityFeedForward, expert_slots
from dsmoe_vl.moe.experts import Expert
from dsmoe_vl.moe.phases import phase
from dsmoe_vl.moe.router import Routing
from dsmoe_vl.moe.stats import RouterStats


class CapacityGate(TopKGate):
    """Our router. It passes its decision to DeepSpeed's gating functions as logits."""

    def __init__(self, source: CapacityFeedForward, width: int, expert_count: int) -> None:
        super().__init__(width, expert_count, source.router.top_k)
        del self.wg
        self.router, self.moe, self.expert_count = source.router, source.moe, expert_count

    def forward(  # type: ignore[override]
        self, x: Tensor, tokens: Tensor, sparse_routes: bool = True, use_tutel: bool = False
    ) -> tuple[RouterStats, int, int, Tensor, Tensor, Tensor, None]:
        """x [T, D]; tokens int64 [3, T]: task, modality, 1 where real.

        Returns what `MOELayer` expects, with statistics in place of its loss: capacity, E, and per choice and token the
        expert or -1 int32 [K, T], its slot int32 [K, T] and the gate float32 [K, T].
        """
        task_ids, modality_ids, real = tokens[0], tokens[1], tokens[2].bool()
        with phase("route"):
            routing = self._route(x, task_ids, modality_ids)
        with phase("dispatch"):  # a trace shows the rest under DeepSpeed's own names
            slots = self._slots(routing, real)
            _, _, _, experts, places, gates, _ = self._assign(_offered(routing, real), slots)
        computed = (experts >= 0) & (experts < self.expert_count)
        if self.router.top_k == 1:
            gates = routing.gates.t() * computed  # DeepSpeed's gate is 1
        routing = _in_order_of(routing, experts.long().clamp(0, self.expert_count - 1).t())
        stats = RouterStats.of(
            routing, task_ids, modality_ids, real, self.router.tasks, self.router.modalities, computed.t()
        )
        return stats, slots, self.expert_count, experts.masked_fill(~computed, -1), places, gates, None

    def _route(self, x: Tensor, task_ids: Tensor, modality_ids: Tensor) -> Routing:
        """The router's decision; in training with the recipe's noise."""
        noise = None
        if self.training and self.moe.noisy_gate == "Jitter":
            x = multiplicative_jitter(x.float(), device=x.device)
        elif self.training and self.moe.noisy_gate == "RSample":
            noise = gumbel_rsample((len(x), self.expert_count), device=x.device)
        return self.router(x, task_ids, modality_ids, noise)

    def _slots(self, routing: Routing, real: Tensor) -> int:
        """Slots per expert, the same on all ranks of the expert-parallel group. Collective if drop_tokens is false."""
        if self.moe.drop_tokens:
            return expert_slots(self.moe, len(real), self.expert_count, self.training)
        wanted = torch.bincount(routing.experts[real].flatten(), minlength=self.expert_count).max().clamp(min=1)
        if is_parallel(self.ep_group):
            dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self.ep_group)
        return int(wanted)

    def _assign(self, offered: Tensor, slots: int) -> Any:
        """DeepSpeed's function for this K, without sampling. With factor 0 the capacity is `slots`, its minimum."""
        if self.router.top_k == 2:
            return top2gating(offered, 0.0, slots, top2_2nd_expert_sampling=False, sparse_routes=True)
        if self.router.top_k > 2:
            return topkgating(offered, self.router.top_k, 0.0, slots, sparse_routes=True)
        if self.training and self.moe.random_token_selection:
            return top1gating(offered, 0.0, slots, use_rts=True, sparse_routes=True)
        # Without random selection, top1gating keeps arbitrary tokens among equals; topkgating keeps the first.
        return topkgating(offered, 1, 0.0, slots, drop_policy="position", sparse_routes=True)


class TokenCounts(NamedTuple):
    """The numbers of tokens T that a forward may have. They are the same on all ranks, whatever these are given."""

    training: frozenset[int]
    evaluation: frozenset[int]


class CapacityMoE(MoE):
    """`CapacityFeedForward` with its experts sharded over an expert-parallel group. Same results.

    Capacity depends on this rank's tokens, and the all-to-all has equal splits: all ranks need the same number in a
    forward, else they wait for ever. `tokens` has the numbers that are the same; None: whoever calls sees to it.
    """

    def __init__(
        self, source: CapacityFeedForward, ep_size: int, ep_rank: int, tokens: TokenCounts | None = None
    ) -> None:
        expert_count, width, _ = source.experts.w2.shape
        super().__init__(
            width, source.experts.single(), expert_count, ep_size, source.router.top_k,
            use_residual=source.mlp is not None,
        )  # fmt: skip
        self.deepspeed_moe.gate = CapacityGate(source, width, expert_count)
        with torch.no_grad():
            for index, expert in enumerate(self.local_experts, ep_rank * self.num_local_experts):
                for name, parameter in expert.named_parameters():  # already marked by DeepSpeed
                    parameter.copy_(getattr(source.experts, name)[index])
        self.first_expert = ep_rank * self.num_local_experts
        self.mlp, self.coefficient, self.shared = source.mlp, source.coefficient, source.shared
        self.tokens = tokens

    @property
    def local_experts(self) -> list[Expert]:
        """This rank's experts."""
        return list(self.deepspeed_moe.experts.deepspeed_experts)

    def forward(  # type: ignore[override]
        self, x: Tensor, task_ids: Tensor, modality_ids: Tensor, real: Tensor
    ) -> tuple[Tensor, RouterStats]:
        """As `CapacityFeedForward.forward`."""
        if self.tokens is not None:
            known = self.tokens.training if self.training else self.tokens.evaluation
            assert len(x) in known, f"{len(x)} tokens, not {sorted(known)}"
        out, stats, _ = super().forward(x, torch.stack((task_ids, modality_ids, real.long())))
        self.deepspeed_moe.l_aux = None  # it is our statistics, and would keep their graph alive
        return (out if self.shared is None else out + self.shared(x)), stats


def one_process_name(name: str) -> str:
    """The name of a parameter or buffer in `CapacityFeedForward`; not for expert parameters."""
    return name.replace(".deepspeed_moe.gate.", ".")


def _in_order_of(routing: Routing, experts: Tensor) -> Routing:
    """The same decision, choices in the order of `experts` int64 [T, K], which is arbitrary where not computed."""
    gates = routing.probabilities.gather(1, experts)
    if experts.shape[1] > 1:
        chosen = routing.probabilities.gather(1, routing.experts)
        gates = gates / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
    return routing._replace(experts=experts, gates=gates)


def _offered(routing: Routing, real: Tensor) -> Tensor:
    """Logits [T, E + K] that make a gating function choose the router's experts, with the router's gates.

    Experts that were not chosen have -inf. Padding chooses the last K columns, which belong to no expert, so it takes
    no slot; real tokens have -inf there.
    """
    chosen = torch.zeros_like(routing.logits, dtype=torch.bool).scatter_(1, routing.experts, True)
    experts = routing.logits.masked_fill(~(chosen & real.unsqueeze(-1)), float("-inf"))
    padding = torch.zeros_like(routing.gates).masked_fill(real.unsqueeze(-1), float("-inf"))
    return torch.cat((experts, padding), dim=1)
