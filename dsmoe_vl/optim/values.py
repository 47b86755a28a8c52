"""This rank's part of the weights, at every ZeRO stage, without a gather."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn


def owned_values(parameter: Any, ranks_per_copy: int, rank: int) -> Tensor | None:
    """The fp32 values of a parameter that are counted on this rank, without ZeRO's padding; None if there are none.

    `ranks_per_copy`: if DeepSpeed does not shard the parameter, only ranks below this number count it.
    """
    if hasattr(parameter, "ds_id"):  # ZeRO-3; padding is uninitialised memory
        values = safe_get_local_fp32_param(parameter)
        return values[: max(parameter.ds_numel - parameter.ds_zero_partition_rank * values.numel(), 0)]
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
        return None if parameter._hp_mapping is None else parameter._hp_mapping.get_hp_fragment()
    return parameter.detach() if rank < ranks_per_copy else None


@torch.no_grad()
def first_non_finite(model: nn.Module) -> str:
    """The name of the engine's first parameter that has a value which is not finite on this rank; "" if there is none.

    Also if the value becomes infinite in the parameter's own precision, bf16.
    """
    names, values, dtypes = [], [], []
    for name, parameter in model.named_parameters():
        own = owned_values(parameter, 1, 0)  # every rank looks at what is not sharded
        if own is not None and own.numel():
            names.append(name)
            values.append(own)
            dtypes.append(parameter.dtype)
    largest = torch._foreach_norm(values, ord=math.inf) if values else ()
    finite = [norm.to(dtype).isfinite() for norm, dtype in zip(largest, dtypes, strict=True)]
    found = torch.stack(finite).tolist() if finite else []  # read back at once
    return next((name for name, is_finite in zip(names, found, strict=True) if not is_finite), "")
