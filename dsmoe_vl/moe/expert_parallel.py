"""The sparse feed-forward over ranks: DeepSpeed's AutoEP layer with our own forward.

DeepSpeed provides the process groups, the marks on expert parameters (they decide how gradients are reduced,
partitioned by ZeRO and saved), and the differentiable all-to-all. The router, the statistics and the products are ours.
`tests/unit/test_deepspeed_contract.py` checks the private names used here.

Shapes: T tokens, D width, E experts, L = E / ep_size experts of this rank, R = T * K rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_folding import mark_autoep_folding_router_parameter
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV, compute_split_plan
from torch import Tensor, nn

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.moe.capacity_feed_forward import CapacityFeedForward
from dsmoe_vl.moe.expert_parallel_capacity import CapacityMoE, TokenCounts
from dsmoe_vl.moe.feed_forward import MoEFeedForward, sparse_forward
from dsmoe_vl.moe.phases import phase
from dsmoe_vl.moe.rows import by_expert, combine, dispatch
from dsmoe_vl.moe.stats import RouterStats

# What DeepSpeed sets on the parameters of experts, and reads to reduce and to partition them.
_MARKS = ("allreduce", "group_name", "ds_zero_placement_family", "ds_zero_partition_group_name")


class ExpertParallelMoE(AutoEPMoELayer):
    """`MoEFeedForward` with its experts sharded over `ep_size` ranks. Same parameter names, same results."""

    def __init__(self, source: MoEFeedForward, ep_size: int, ep_rank: int) -> None:
        super().__init__(_spec(source), source, ep_size, ep_rank, AutoEPConfig(enabled=True, autoep_size=ep_size))
        del self.tokens_per_expert  # evaluation and recomputation would distort it; RouterStats replaces it
        ours, marked = source.experts, self.get_submodule("experts")
        first = ep_rank * self.num_local_experts
        for name, whole in list(ours.named_parameters()):
            own = getattr(marked, name, None)  # this rank's slice, with DeepSpeed's marks
            if own is None:  # an adapter, which DeepSpeed's experts do not have
                own = nn.Parameter(whole.detach()[first : first + self.num_local_experts].clone())
                for mark in _MARKS:
                    setattr(own, mark, getattr(marked.w1, mark))
            setattr(ours, name, own)
        self.experts = ours
        self.router = source.router
        for parameter in self.router.parameters():
            _mark_replicated(parameter)
        self.shared = source.shared

    def forward(  # type: ignore[override]
        self, x: Tensor, task_ids: Tensor, modality_ids: Tensor, real: Tensor
    ) -> tuple[Tensor, RouterStats]:
        """As `MoEFeedForward.forward`."""
        return sparse_forward(self.router, self._exchange, self.shared, x, task_ids, modality_ids, real)

    def _exchange(self, x: Tensor, gates: Tensor | None, order: Tensor, places: Tensor, counts: Tensor) -> Tensor:
        """As `Experts.forward`: send each row to its expert's rank, compute there, send it back."""
        if self.ep_size == 1:
            with phase("experts"):
                return self.experts(x, gates, order, places, counts)
        with phase("dispatch"):
            rows = dispatch(x, order, places)
        with phase("all_to_all"):
            plan = compute_split_plan(
                rows, self.num_experts, self.ep_size, self.num_local_experts, self.ep_group, counts.to(torch.int32)
            )
            received = _AllToAllV.apply(self.ep_group, rows, plan.input_splits, plan.output_splits)
        with phase("experts"):
            # Received rows are sorted by source rank, then expert: each is a token with one expert.
            by_source = plan.local_counts_by_source.long()
            local = torch.arange(self.num_local_experts, device=rows.device).repeat(self.ep_size)
            owner = torch.repeat_interleave(local, by_source.flatten(), output_size=received.shape[0])
            computed = self.experts(received, None, *by_expert(owner.unsqueeze(1), self.num_local_experts))
        with phase("all_to_all"):
            returned = _AllToAllV.apply(self.ep_group, computed, plan.output_splits, plan.input_splits)
        with phase("combine"):
            return combine(returned, gates, order, places)


def spread_experts(model: nn.Module, ep_size: int, rank: int | None = None, tokens: TokenCounts | None = None) -> None:
    """Replace every sparse feed-forward of `model` by its expert-parallel form, in place, before the engine is built.

    Each group of `ep_size` ranks, one after another, has every expert once. rank: this process; by default that of
    torch.distributed. tokens: see `CapacityMoE`. Raises ConfigError if a number of experts is no multiple of ep_size.

    Asserts that exactly the expert tensors are marked: DeepSpeed reduces an unmarked one like a dense parameter.
    """
    ep_rank = (dist.get_rank() if rank is None else rank) % ep_size
    experts: set[str] = set()
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if not isinstance(module, (MoEFeedForward, CapacityFeedForward)):
            continue
        count = module.experts.w2.shape[0]
        if count % ep_size:
            raise ConfigError(
                f"{name}: {count} experts cannot be spread over ep_size = {ep_size} ranks: give a divisor"
            )
        spread: nn.Module
        if isinstance(module, MoEFeedForward):
            spread = ExpertParallelMoE(module, ep_size, ep_rank)
        else:
            spread = CapacityMoE(module, ep_size, ep_rank, tokens)
        experts |= {f"{name}.{inner}" for inner, _ in spread.named_parameters() if "experts." in inner}
        setattr(model.get_submodule(parent), child, spread)
    for name, parameter in model.named_parameters():
        marked = getattr(parameter, "allreduce", True) is False
        assert marked == (name in experts), f"{name}: marked as expert: {marked}"


def _mark_replicated(parameter: Any) -> None:
    """Mark it as DeepSpeed marks its own router: the gradient is averaged over all ranks."""
    parameter.allreduce = True
    parameter.ds_zero_placement_family = "replicated"
    mark_autoep_folding_router_parameter(parameter)


def _spec(source: MoEFeedForward) -> MoELayerSpec:
    """The description of our layer that DeepSpeed's detection would return."""
    experts, width, hidden = source.experts.w2.shape
    return MoELayerSpec(
        moe_module_name="feed_forward",
        model_family="custom",
        router_name="router",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="w1",
        expert_w2_name="w2",
        expert_w3_name="w3",
        num_experts=experts,
        top_k=source.router.top_k,
        hidden_size=width,
        ffn_hidden_size=hidden,
        score_func="softmax",  # of DeepSpeed's own router, which is not used: ours is
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
