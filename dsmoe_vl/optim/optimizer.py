"""The base optimizer, built by the engine from the DeepSpeed JSON's `optimizer` section."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from dsmoe_vl.planner.plan import RunPlan

GROUPS = ("experts", "matrices", "vectors")  # routed experts; other matrices; norms and biases


def adamw_builder(plan: RunPlan) -> Callable[[Any], torch.optim.Optimizer]:
    """A callable for `deepspeed.initialize(optimizer=...)`: an instance would lack the marked expert groups."""
    parameters = dict(plan.deepspeed["optimizer"].get("params", {}))
    weight_decay = parameters.pop("weight_decay", 0.01)
    if "betas" in parameters:
        parameters["betas"] = tuple(parameters["betas"])
    offload = plan.deepspeed.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"

    def build(groups: Any) -> torch.optim.Optimizer:
        if offload:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, weight_decay=weight_decay, **parameters)
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True, **parameters)

    return build


def group_of(name: str, parameter: nn.Parameter) -> str:
    """The one of GROUPS that a parameter of the engine's module belongs to."""
    if ".experts." in name:
        return "experts"
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return "matrices" if len(shape) >= 2 and not name.endswith("_bias") else "vectors"


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, everything else without; experts in groups of their own, with a key "moe"."""
    decayed: dict[str, Any] = {"name": "matrices", "params": []}
    plain: dict[str, Any] = {"name": "vectors", "params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        (plain if group_of(name, parameter) == "vectors" else decayed)["params"].append(parameter)
    groups = split_params_into_different_moe_groups_for_optimizer([decayed, plain])
    return [group for group in groups if group["params"]]
