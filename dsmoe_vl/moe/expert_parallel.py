"""The sparse feed-forward over ranks: DeepSpeed's AutoEP layer with our own forward.

DeepSpeed provides the process groups and the marks on expert parameters (they decide how gradients are reduced,
partitioned by ZeRO and saved). The router, the statistics, the exchange of tokens and the products are ours.
`tests/unit/test_deepspeed_contract.py` checks the private names used here.

Shapes: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_folding import mark_autoep_folding_router_parameter
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.moe.capacity_feed_forward import CapacityFeedForward
from dsmoe_vl.moe.expert_parallel_capacity import CapacityMoE, TokenCounts
from dsmoe_vl.moe.feed_forward import MoEFeedForward, run_sorted, sparse_forward
from dsmoe_vl.moe.phases import phase
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.moe.token_exchange import TokenExchange

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

    def _exchange(self, x: Tensor, experts: Tensor, gates: Tensor, expert_count: int) -> Tensor:
        """Send each token to the ranks of its experts, compute there, send the sums back. Collective."""
        if self.ep_size == 1:
            return run_sorted(self.experts, x, experts, gates, expert_count)
        with phase("dispatch"):
            first = self.ep_rank * self.num_local_experts
            local = range(first, first + self.num_local_experts)
            exchange = TokenExchange.plan(experts, local, self.ep_size, self.ep_group)
            received = exchange.send(x, gates.to(x.dtype), experts)
        with phase("experts"):
            computed = self.experts(*received)
        with phase("combine"):
            return exchange.send_back(computed)


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
