"""Gradient norms per part of the model, computed from each rank's own shards without a gather."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

from dsmoe_vl.config.parts import PARTS, part_of


@torch.no_grad()
def local_squares(model: nn.Module, ep_size: int, rank: int, device: torch.device) -> Tensor:
    """This rank's share of each part's squared gradient norm, float32 [len(PARTS)]; sum it over ranks.

    Frozen parts have 0. Call it between the last backward of a step and its update: gradients are averaged, but not yet
    clipped.
    """
    squares = torch.zeros(len(PARTS), device=device)
    by_part: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        shard = _shard(parameter, ep_size if part == "experts" else 1, rank)
        if shard is not None and shard.numel():
            by_part.setdefault(part, []).append(shard)
    for part, shards in by_part.items():
        norms = torch.stack(torch._foreach_norm(shards)).float()
        squares[PARTS.index(part)] = norms.square().sum().to(device)
    return squares


def _shard(parameter: Any, ranks_per_copy: int, rank: int) -> Tensor | None:
    """The part of a gradient that is counted on this rank; None if absent.

    `ranks_per_copy`: if DeepSpeed does not shard the gradient, only ranks below this number count it.
    """
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        gradient = safe_get_local_grad(parameter)
        real = max(parameter.ds_numel - parameter.ds_zero_partition_rank * gradient.numel(), 0)
        return gradient.flatten()[:real]
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2, and the bf16 optimizer
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        address = mapping.lp_fragment_address
        whole = gradient.numel() == parameter.numel()
        return gradient[address.start : address.start + address.numel] if whole else gradient[: address.numel]
    return parameter.grad if rank < ranks_per_copy else None
