"""Differentiable collectives. All ranks must call them in the same order, whatever their batch contains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """[n, W] of every rank -> [ranks, n, W]. Backward: the gradient of each part is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered.unflatten(0, (-1, x.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def own_rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows of all ranks in rank order, with exact gradients: [rows[rank], W] -> [sum(rows), W].

    `rows` is the same on all ranks. If any rank has rows, all ranks take part in the collective, also in the backward
    pass.
    """
    if len(rows) == 1 or max(rows) == 0:
        return x
    padding = x.new_zeros(max(rows) - x.shape[0], *x.shape[1:])
    gathered = _AllGather.apply(torch.cat((x, padding)))
    return torch.cat([part[:count] for part, count in zip(gathered.unbind(), rows, strict=True)])


def summed_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks; the gradient flows only to this rank's `x`.

    For a function of the sum that every rank computes in the same way: each rank gets the gradient of its own `x`, and
    these add up to the whole gradient.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return x + (total - x.detach())
