"""The sparse feed-forward with expert capacity, on one process and without DeepSpeed.

`capacity.py` is the same computation on DeepSpeed's classic MoE layer. Here the experts are the dropless module, with
the same parameter names, and a dropped assignment gets gate 0.

Shapes: T tokens, D width, F hidden width, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dsmoe_vl.config.model import MoEConfig
from dsmoe_vl.moe.experts import Expert, Experts
from dsmoe_vl.moe.feed_forward import run_sorted
from dsmoe_vl.moe.router import Router
from dsmoe_vl.moe.stats import RouterStats


class CapacityFeedForward(nn.Module):
    """Router, experts with a capacity, and an optional shared expert.

    With `moe.residual` one more expert processes every token; a learned softmax of two numbers weights it against the
    routed ones (Rajbhandari et al. 2022, DeepSpeed-MoE, section 4.1). Names as in DeepSpeed.
    """

    def __init__(self, moe: MoEConfig, width: int, router: Router, experts: Experts, shared: nn.Module | None) -> None:
        super().__init__()
        self.moe = moe
        self.router = router
        self.experts = experts
        self.shared = shared
        self.mlp = Expert(width, moe.ffn_width) if moe.residual else None
        self.coefficient = nn.Linear(width, 2) if moe.residual else None

    def forward(self, x: Tensor, task_ids: Tensor, modality_ids: Tensor, real: Tensor) -> tuple[Tensor, RouterStats]:
        """As `MoEFeedForward.forward`. Padding gets gate 0: its rows are the shared and residual branches only."""
        routing = self.router(x, task_ids, modality_ids)
        expert_count = routing.logits.shape[-1]
        kept = real.unsqueeze(-1).expand_as(routing.experts)
        if self.moe.drop_tokens:
            slots = expert_slots(self.moe, len(x), expert_count, self.training)
            kept = within_capacity(routing.experts, routing.gates, real, expert_count, slots)
        stats = RouterStats.of(routing, task_ids, modality_ids, real, self.router.tasks, self.router.modalities, kept)
        gates = routing.gates * kept
        if self.router.top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)
        out = run_sorted(self.experts, x, routing.experts, gates, expert_count)
        if self.mlp is not None and self.coefficient is not None:
            share = self.coefficient(x).softmax(-1)
            out = out * share[:, :1] + self.mlp(x) * share[:, 1:]
        return (out if self.shared is None else out + self.shared(x)), stats


def expert_slots(moe: MoEConfig, tokens: int, experts: int, training: bool) -> int:
    """Maximum number of assignments per expert, for T = `tokens`: `ceil(factor K T / E)` (Lepikhin et al. 2020, GShard,
    section 2.2), at least `moe.min_capacity`, at most T, because an expert gets a token only once."""
    factor = moe.capacity_factor if training else moe.eval_capacity_factor
    return min(max(math.ceil(factor * moe.top_k * tokens / experts), moe.min_capacity), tokens)


def within_capacity(experts: Tensor, gates: Tensor, real: Tensor, expert_count: int, slots: int) -> Tensor:
    """Which assignments get a slot: bool [T, K]. experts int64 and gates float32 [T, K], real bool [T].

    Each expert takes the first `slots` of its assignments, in the order of DeepSpeed's gating functions. Up to K = 2:
    first choices of all tokens before second choices, then earlier tokens before later ones (top2gating). For larger K:
    larger gates first (topkgating). Padding gets no slot.
    """
    tokens, top_k = experts.shape
    if top_k <= 2:
        of_token = torch.arange(tokens, device=experts.device) * top_k
        order = (of_token.unsqueeze(-1) + gates.argsort(dim=-1, descending=True, stable=True)).t().flatten()
    else:
        order = gates.flatten().argsort(descending=True, stable=True)
    owner = experts.masked_fill(~real.unsqueeze(-1), expert_count).flatten()[order]
    owner, by_owner = owner.sort(stable=True)
    counts = torch.bincount(owner, minlength=expert_count + 1)
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    kept = torch.empty_like(owner, dtype=torch.bool)
    kept[order[by_owner]] = (place < slots) & (owner < expert_count)
    return kept.view(tokens, top_k)
