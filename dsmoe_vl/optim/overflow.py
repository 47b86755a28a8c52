"""An update whose gradient is not finite, at ZeRO-0 in fp32.

There the engine uses PyTorch's optimizer as it is, which applies any gradient. DeepSpeed's own optimizers compute the
norm over all ranks, experts included, and skip the update if it is not finite. Here the plain one gets the attributes
that the engine reads from those: `overflow` (this update is skipped) and `_global_grad_norm`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_vl.optim.gradients import local_squares


def add_overflow(optimizer: Any) -> None:
    """Give a plain optimizer the attribute `overflow`; while it is true, `step` changes nothing."""
    optimizer.overflow = False

    def drop_gradients(stepped: Any, *_: Any) -> None:
        if stepped.overflow:
            stepped.zero_grad()  # without gradients, weights and moments stay as they are

    optimizer.register_step_pre_hook(drop_gradients)


def measure_gradient(optimizer: Any, model: torch.nn.Module, ep_size: int, rank: int, device: torch.device) -> None:
    """Set the norm of the gradient over all ranks, and `overflow`, between the last backward and the update.

    Not in the optimizer's hook: the engine clips before, which makes zeros of a gradient whose norm is infinite.
    Collective: one all-reduce of one number, because an expert's gradient is on some ranks only.
    """
    squares: Tensor = local_squares(model, ep_size, rank, device).sum()
    if dist.get_world_size() > 1:
        dist.all_reduce(squares)
    optimizer._global_grad_norm = float(squares.sqrt())
    optimizer.overflow = not math.isfinite(optimizer._global_grad_norm)
