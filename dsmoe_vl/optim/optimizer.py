"""The base optimizer, built by the engine from the DeepSpeed JSON's `optimizer` section."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsmoe_vl.planner.plan import RunPlan


def optimizer_builder(plan: RunPlan) -> Callable[[Any], torch.optim.Optimizer]:
    """A callable for `deepspeed.initialize(optimizer=...)`: an instance would lack the expert groups."""
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
