"""The L1 term of the objective, lambda Omega(theta) with Omega = sum_g c_g ||theta_g||_1, and the zeros that it makes.

The term has no gradient of its own: the base optimizer follows each of its updates by the term's proximal operator. So
weights become exactly zero, on every ZeRO stage, and stay zero until the loss pulls harder than the term.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from dsmoe_vl.config.recipe import L1Config
from dsmoe_vl.optim.parameter_groups import GROUPS, group_of
from dsmoe_vl.planner.plan import RunPlan


def add_proximal_step(optimizer: torch.optim.Optimizer, l1: L1Config) -> None:
    """Follow every update of `optimizer` by `theta <- sign(theta) max(|theta| - lr lambda c_g, 0)`, in place.

    This soft threshold is the proximal operator of lr lambda c_g ||theta_g||_1 (Parikh & Boyd 2014, section 6.5.2); lr
    is the group's current one. It applies to what the groups hold at that moment: the shards that ZeRO steps, one group
    at a time. Groups are those of `parameter_groups`. With lambda 0 nothing is added.
    """
    if l1.weight == 0:
        return

    @torch.no_grad()
    def shrink(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepped.param_groups:
            # Not a key of the group: a resumed one would bring back the coefficient that it was saved with.
            coefficient = getattr(l1, "experts" if group.get("moe") else group["name"])
            threshold = float(group["lr"]) * l1.weight * coefficient
            if threshold > 0:
                for values in group["params"]:
                    torch.ops.aten.softshrink.out(values, threshold, out=values)

    optimizer.register_step_post_hook(shrink)


@torch.no_grad()
def sparsity(model: nn.Module, plan: RunPlan, rank: int, device: torch.device) -> dict[str, float]:
    """Of the engine's module: `omega`, and the fractions of weights that are exactly zero, of all and of the experts.

    Read from the fp32 values that the optimizer updates (at ZeRO-0 from the module's own), each on one rank only.
    Collective: one all-reduce of nine numbers.
    """
    rows = {kind: torch.zeros(3, dtype=torch.float64, device=device) for kind in GROUPS}  # norm, nonzeros, values
    for name, parameter in model.named_parameters():
        kind = group_of(name, parameter)
        values = _owned_values(parameter, plan.ep_size if kind == "experts" else 1, rank)
        if values is not None:
            size = torch.tensor(values.numel(), device=values.device)
            rows[kind] += torch.stack((values.abs().sum().double(), values.count_nonzero(), size)).to(device)
    sums = torch.stack(list(rows.values()))
    if plan.world_size > 1:
        dist.all_reduce(sums)
    l1 = plan.recipe.objective.l1
    coefficients = torch.tensor([getattr(l1, kind) for kind in GROUPS], dtype=torch.float64)
    norms, nonzeros, sizes = sums.cpu().unbind(1)
    fractions = {"zero_fraction": float(1 - nonzeros.sum() / sizes.sum())}
    experts = GROUPS.index("experts")
    if sizes[experts]:
        fractions["zero_fraction_experts"] = float(1 - nonzeros[experts] / sizes[experts])
    return {"omega": float(norms @ coefficients), **fractions}


def _owned_values(parameter: Any, holders: int, rank: int) -> Tensor | None:
    """Those values of a parameter that count on this rank; None where there are none. ZeRO's padding is left out.

    `holders`: the first ranks that together hold one copy, where DeepSpeed does not divide the parameter.
    """
    if hasattr(parameter, "ds_id"):  # ZeRO-3; padding has whatever values the memory had
        values = safe_get_local_fp32_param(parameter)
        return values[: max(parameter.ds_numel - parameter.ds_zero_partition_rank * values.numel(), 0)]
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
        return None if parameter._hp_mapping is None else parameter._hp_mapping.get_hp_fragment()
    return parameter.detach() if rank < holders else None
