"""The sparse feed-forward by itself, for other people's models: in plain PyTorch, or in a DeepSpeed engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsmoe_vl.config.bounds import out_of_bounds
from dsmoe_vl.config.model import MoEConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.moe.balance import load_balance_loss, router_z_loss
from dsmoe_vl.moe.capacity_feed_forward import CapacityFeedForward
from dsmoe_vl.moe.experts import Expert, Experts
from dsmoe_vl.moe.feed_forward import MoEFeedForward
from dsmoe_vl.moe.router import Router
from dsmoe_vl.moe.stats import RouterStats

_ROUTER_STD = 0.02  # near-even routing at the start


class SparseMoE(nn.Module):
    """A router that knows a token's task, and E SwiGLU experts, of which every token uses K.

    In a DeepSpeed engine with expert parallelism, call `spread_experts(model, ep_size)` before `deepspeed.initialize`,
    on models that are equal on all ranks (the same seed).

    Args:
        num_hidden: D, the width of a token.
        num_experts, top_k: E and K.
        num_tasks, num_modalities: how many the router tells apart. Its biases for them start at zero.
        ffn_width: F, the hidden width of one expert; 4 D by default.
        routing: "token" (by token, task and modality), "plain" (by token), "task", or "isolated": as "token", within
            the experts of the token's modality.
        backend: "dropless" computes every assignment; "capacity" drops what is beyond `capacity_factor` times an even
            share of a forward's tokens, and needs as many tokens on every rank.

    Raises ConfigError for values that make no layer.
    """

    def __init__(
        self, num_hidden: int = 128, num_experts: int = 4, num_tasks: int = 1, *, num_modalities: int = 1,
        top_k: int = 2, ffn_width: int | None = None, routing: str = "token", backend: str = "dropless",
        capacity_factor: float = 1.25,
    ) -> None:  # fmt: skip
        super().__init__()
        moe = MoEConfig(
            backend=backend, experts=num_experts, top_k=top_k, routing=routing, capacity_factor=capacity_factor,
            ffn_width=4 * num_hidden if ffn_width is None else ffn_width,
        )  # fmt: skip
        _check(moe, num_hidden, num_tasks, num_modalities)
        router = Router(num_hidden, num_experts, top_k, num_tasks, num_modalities, routing)
        experts = Experts(num_experts, num_hidden, moe.ffn_width)
        self.layer: nn.Module = (
            MoEFeedForward(router, experts, None)
            if backend == "dropless"
            else CapacityFeedForward(moe, num_hidden, router, experts, None)
        )
        self.num_experts = num_experts
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Experts: normal with variance 1 / fan-in. The router: near-even. Before the experts are spread."""
        for module in self.modules():
            if isinstance(module, Router):
                nn.init.normal_(module.weight, std=_ROUTER_STD)
                if module.mode == "task":  # equal biases would send every task to the same experts
                    nn.init.normal_(module.task_bias, std=_ROUTER_STD)
            elif isinstance(module, (Experts, Expert)):
                for matrix in (module.w1, module.w2, module.w3):
                    nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5)

    def forward(
        self, x: Tensor, task_ids: Tensor | int = 0, modality_ids: Tensor | int = 0, real: Tensor | None = None
    ) -> tuple[Tensor, RouterStats]:
        """x [..., D] -> ([..., D], statistics of the routing).

        task_ids, modality_ids: int64 [...], or one for all tokens; of a shape that broadcasts, such as [B, 1] for x
        [B, T, D]. real: bool [...], false for padding, which is not counted; all by default.
        """
        shape = x.shape[:-1]

        def of_tokens(values: Tensor | int) -> Tensor:
            return torch.as_tensor(values, device=x.device).expand(shape).reshape(-1)

        out, stats = self.layer(
            x.reshape(-1, x.shape[-1]), of_tokens(task_ids), of_tokens(modality_ids),
            of_tokens(True if real is None else real),
        )  # fmt: skip
        return out.view(x.shape), stats


def auxiliary_loss(stats: RouterStats, balance: float = 0.01, z: float = 0.001) -> Tensor:
    """The terms that keep a router even and its logits small, of one layer's forward: a scalar to add to a loss.

    `balance` times the load-balance loss (Fedus et al. 2021, eq. 4), which is 1 if routing is even, plus `z` times the
    router z-loss (Zoph et al. 2022, eq. 5). Both of this rank's tokens alone.
    """
    probability = stats.probability_sum.sum((0, 1))
    tokens = float(probability.sum().detach().clamp(min=1))  # the probabilities of a token sum to 1
    load = stats.load.sum((0, 1))
    even = load_balance_loss(probability.view(1, 1, -1), (load / load.sum().clamp(min=1)).view(1, 1, -1), tokens)
    return balance * even + z * router_z_loss(stats.z_sum.view(1), tokens)


def _check(moe: MoEConfig, width: int, tasks: int, modalities: int) -> None:
    names = {"experts": "num_experts"}
    for key, value, rule in out_of_bounds(moe):
        raise ConfigError(f"SparseMoE({names.get(key, key)}={value!r}): {rule}")
    for name, count in {"num_hidden": width, "num_tasks": tasks, "num_modalities": modalities}.items():
        if count < 1:
            raise ConfigError(f"SparseMoE({name}={count}): must be at least 1")
    if moe.top_k > moe.experts:
        raise ConfigError(f"SparseMoE(top_k={moe.top_k}): there are only num_experts={moe.experts}")
    if moe.routing == "isolated" and moe.top_k > moe.experts // modalities:
        raise ConfigError(
            f"SparseMoE(top_k={moe.top_k}): a modality has only {moe.experts // modalities} of "
            f"num_experts={moe.experts} with num_modalities={modalities}"
        )
