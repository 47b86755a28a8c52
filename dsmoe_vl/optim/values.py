"""This rank's part of the weights, at every ZeRO stage, without a gather."""

from __future__ import annotations

from typing import Any

from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor


def owned_values(parameter: Any, ranks_per_copy: int, rank: int) -> Tensor | None:
    """The values of a parameter that are counted on this rank, without ZeRO's padding; None if there are none. Those in
    fp32 that are updated, of a frozen one the model's own.

    `ranks_per_copy`: if DeepSpeed does not shard the parameter, only ranks below this number count it.
    """
    if hasattr(parameter, "ds_id"):  # ZeRO-3; padding is uninitialised memory
        is_updated = parameter.requires_grad
        values = safe_get_local_fp32_param(parameter) if is_updated else parameter.ds_tensor.detach().flatten()
        return values[: max(parameter.ds_numel - parameter.ds_zero_partition_rank * values.numel(), 0)]
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
        return None if parameter._hp_mapping is None else parameter._hp_mapping.get_hp_fragment()
    return parameter.detach() if rank < ranks_per_copy else None
