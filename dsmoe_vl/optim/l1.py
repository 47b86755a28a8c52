"""The L1 term of the objective, lambda Omega(theta) with Omega = sum_g c_g ||theta_g||_1, and the resulting zeros.

The term adds no gradient. Instead its proximal operator is applied after every update of the base optimizer. So weights
become exactly zero, on every ZeRO stage, and stay zero while the term is stronger than the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsmoe_vl.config.recipe import L1Config
from dsmoe_vl.optim.parameter_groups import GROUPS, group_of
from dsmoe_vl.optim.values import owned_values
from dsmoe_vl.planner.plan import RunPlan


def add_proximal_step(optimizer: torch.optim.Optimizer, l1: L1Config) -> None:
    """After every update of `optimizer`, apply `theta <- sign(theta) max(|theta| - lr lambda c_g, 0)` in place.

    This soft threshold is the proximal operator of lr lambda c_g ||theta_g||_1 (Parikh & Boyd 2014, section 6.5.2); lr
    is the group's current one. It applies to the tensors that the groups contain at that moment: the shards that ZeRO
    updates, one group at a time. The groups come from `parameter_groups`. If lambda is 0, no hook is added.
    """
    if l1.weight == 0:
        return

    @torch.no_grad()
    def shrink(stepped: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(stepped, "overflow", False):  # the update was skipped
            return
        for group in stepped.param_groups:
            # Not a key of the group: resuming would restore the coefficient of the checkpoint.
            coefficient = getattr(l1, "experts" if group.get("moe") else group["name"])
            threshold = float(group["lr"]) * l1.weight * coefficient
            if threshold > 0:
                for values in group["params"]:
                    torch.ops.aten.softshrink.out(values, threshold, out=values)

    optimizer.register_step_post_hook(shrink)


@torch.no_grad()
def sparsity(model: nn.Module, plan: RunPlan, rank: int, device: torch.device) -> dict[str, float]:
    """`omega` of the engine's module, and the fraction of weights that are exactly zero: of all, and of the experts.

    Computed from the fp32 values that the optimizer updates (at ZeRO-0 the module's own); each is counted on one rank
    only. Collective: one all-reduce of nine numbers.
    """
    rows = {kind: torch.zeros(3, dtype=torch.float64, device=device) for kind in GROUPS}  # norm, nonzeros, values
    for name, parameter in model.named_parameters():
        kind = group_of(name, parameter)
        values = owned_values(parameter, plan.ep_size if kind == "experts" else 1, rank)
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
