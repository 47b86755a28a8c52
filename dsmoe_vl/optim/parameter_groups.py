"""Parameter groups of the optimizer: what trains, by learning rate and weight decay, and separate for experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from dsmoe_vl.config.parts import is_matrix
from dsmoe_vl.planner.trained import Rule

GROUPS = ("experts", "matrices", "vectors")  # routed experts; other matrices; norms and biases


def group_of(name: str, parameter: nn.Parameter) -> str:
    """The entry of GROUPS for a parameter of the engine's module."""
    if ".experts." in name:
        return "experts"
    return "matrices" if is_matrix(name, getattr(parameter, "ds_shape", parameter.shape)) else "vectors"


def parameter_groups(
    model: nn.Module, rate: float, rule_of: Callable[[str], Rule], updates_of: Callable[[str], int] = lambda name: 0
) -> list[dict[str, Any]]:
    """Matrices with weight decay, everything else without; experts in separate groups with a key "moe"; nothing that is
    frozen.

    rate: the peak learning rate. A group's `lr` is that times its `rate_factor`, the factor of its parameters.
    rule_of, updates_of: by the engine's name; how a parameter trains, and how many updates its moments have seen, which
    is one number for a group because ZeRO keeps one for it.
    """
    alike: dict[tuple[Rule, int], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not rule_of(name).freeze:
            alike.setdefault((rule_of(name), updates_of(name)), []).append((name, parameter))
    groups = []
    for (rule, _), named in alike.items():
        common = {"lr": rate * rule.lr_scale, "rate_factor": rule.lr_scale}
        decay = {} if rule.weight_decay is None else {"weight_decay": rule.weight_decay}
        decayed: dict[str, Any] = {"name": "matrices", "params": [], **common, **decay}
        plain: dict[str, Any] = {"name": "vectors", "params": [], "weight_decay": 0.0, **common}
        for name, parameter in named:
            (plain if group_of(name, parameter) == "vectors" else decayed)["params"].append(parameter)
        # One call for each rule: it tells groups apart by their names alone.
        groups += split_params_into_different_moe_groups_for_optimizer([decayed, plain])
    return [group for group in groups if group["params"]]


def rate_of(optimizer: Any) -> float:
    """The learning rate at present of parts whose factor is 1."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group["rate_factor"])
