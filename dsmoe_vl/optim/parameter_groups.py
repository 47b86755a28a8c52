"""Parameter groups of the optimizer: with or without weight decay, and separate for experts."""

from __future__ import annotations

from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

GROUPS = ("experts", "matrices", "vectors")  # routed experts; other matrices; norms and biases


def group_of(name: str, parameter: nn.Parameter) -> str:
    """The entry of GROUPS for a parameter of the engine's module."""
    if ".experts." in name:
        return "experts"
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return "matrices" if len(shape) >= 2 and not name.endswith("_bias") else "vectors"


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, everything else without; experts in separate groups with a key "moe"."""
    decayed: dict[str, Any] = {"name": "matrices", "params": []}
    plain: dict[str, Any] = {"name": "vectors", "params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        (plain if group_of(name, parameter) == "vectors" else decayed)["params"].append(parameter)
    groups = split_params_into_different_moe_groups_for_optimizer([decayed, plain])
    return [group for group in groups if group["params"]]
