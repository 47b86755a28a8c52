"""Parameter groups of the optimizer: by learning rate, with or without weight decay, and separate for experts."""

from __future__ import annotations

from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from dsmoe_vl.config.recipe import LearningRateConfig

GROUPS = ("experts", "matrices", "vectors")  # routed experts; other matrices; norms and biases
PARTS = ("vision", "embedding", "attention", "feed_forward", "experts", "router", "heads")


def part_of(name: str) -> str:
    """The entry of PARTS for a parameter of the engine's module. Norms belong to the layer after them, the connector to
    "vision". "experts" are the routed ones; shared and dense feed-forwards are "feed_forward"."""
    if ".experts." in name or ".deepspeed_experts." in name:
        return "experts"
    if ".router." in name:
        return "router"
    if "vision." in name or "connector." in name:
        return "vision"
    if ".attention" in name:
        return "attention"
    if ".feed_forward" in name:
        return "feed_forward"
    return "embedding" if "embedding." in name else "heads"


def group_of(name: str, parameter: nn.Parameter) -> str:
    """The entry of GROUPS for a parameter of the engine's module."""
    if ".experts." in name:
        return "experts"
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return "matrices" if len(shape) >= 2 and not name.endswith("_bias") else "vectors"


def parameter_groups(model: nn.Module, rate: float, factors: LearningRateConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay, everything else without; experts in separate groups with a key "moe".

    rate: the peak learning rate. A group's `lr` is that times its `rate_factor`, the factor of its parts.
    """
    by_factor: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        by_factor.setdefault(getattr(factors, part_of(name)), []).append((name, parameter))
    groups = []
    for factor, named in by_factor.items():
        common = {"lr": rate * factor, "rate_factor": factor}
        decayed: dict[str, Any] = {"name": "matrices", "params": [], **common}
        plain: dict[str, Any] = {"name": "vectors", "params": [], "weight_decay": 0.0, **common}
        for name, parameter in named:
            (plain if group_of(name, parameter) == "vectors" else decayed)["params"].append(parameter)
        # One call for each factor: it tells groups apart by their names alone.
        groups += split_params_into_different_moe_groups_for_optimizer([decayed, plain])
    return [group for group in groups if group["params"]]


def rate_of(optimizer: Any) -> float:
    """The learning rate at present of parts whose factor is 1."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group["rate_factor"])
