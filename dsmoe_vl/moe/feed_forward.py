"""The sparse feed-forward of a decoder layer on one process; `expert_parallel.py` spreads the same over ranks.

    1. route      x [T, D] -> K experts and gates per token
    2. sort       T * K assignments by expert:   experts  [1 0, 0 2, 1 2]  (three tokens, K = 2)
                                                 order    [1 2, 0 4, 3 5]  -> expert 0: tokens 0, 1; 1: 0, 2; 2: 1, 2
    3. compute    every expert on its rows
    4. combine    back to token order, weighted by the gates, summed over K
    5. shared     add the shared expert, if there is one

Shapes: T tokens, D width, E experts, K experts per token, R = T * K.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from dsmoe_vl.moe.experts import Experts
from dsmoe_vl.moe.phases import phase
from dsmoe_vl.moe.router import Router
from dsmoe_vl.moe.rows import Assignments
from dsmoe_vl.moe.stats import RouterStats


class MoEFeedForward(nn.Module):
    """Router, experts and an optional shared expert. Dropless: every assignment is computed."""

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def forward(self, x: Tensor, task_ids: Tensor, modality_ids: Tensor, real: Tensor) -> tuple[Tensor, RouterStats]:
        """x [T, D]; task_ids, modality_ids int64 [T]; real bool [T] -> ([T, D], statistics of this layer)."""
        return sparse_forward(self.router, self._run, self.shared, x, task_ids, modality_ids, real)

    def _run(self, x: Tensor, experts: Tensor, gates: Tensor, expert_count: int) -> Tensor:
        return run_sorted(self.experts, x, experts, gates, expert_count)


class RunExperts(Protocol):
    """Steps 2 to 4, which may use other ranks: x [T, D], experts int64 and gates [T, K] -> [T, D]."""

    def __call__(self, x: Tensor, experts: Tensor, gates: Tensor, expert_count: int) -> Tensor: ...


def sparse_forward(
    router: Router,
    run_experts: RunExperts,
    shared: nn.Module | None,
    x: Tensor,
    task_ids: Tensor,
    modality_ids: Tensor,
    real: Tensor,
) -> tuple[Tensor, RouterStats]:
    """The five steps."""
    with phase("route"):
        routing = router(x, task_ids, modality_ids)
        stats = RouterStats.of(routing, task_ids, modality_ids, real, router.tasks, router.modalities)
    out = run_experts(x, routing.experts, routing.gates, routing.logits.shape[-1])
    return (out if shared is None else out + shared(x)), stats


def run_sorted(module: Experts, x: Tensor, experts: Tensor, gates: Tensor, expert_count: int) -> Tensor:
    """Steps 2 to 4 with all experts in `module`. x [T, D], experts int64 and gates float32 [T, K] -> [T, D]."""
    with phase("dispatch"):
        assignments = Assignments.of(experts, expert_count)
    with phase("experts"):
        out: Tensor = module(x, gates.to(x.dtype).flatten(), assignments)
    return out
