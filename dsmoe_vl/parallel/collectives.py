"""Differentiable exchange between ranks. Every rank calls these alike, whatever its data holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """[n, W] of every rank -> [ranks, n, W]. The gradient of a rank's part is the sum over all ranks."""

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
    """The rows of all ranks in order of rank, with exact gradients: [rows[rank], W] -> [sum(rows), W].

    `rows` is known to every rank, so all take part or none: a rank without rows takes part where another has some, in
    the backward too.
    """
    if len(rows) == 1 or max(rows) == 0:
        return x
    padding = x.new_zeros(max(rows) - x.shape[0], *x.shape[1:])
    gathered = _AllGather.apply(torch.cat((x, padding)))
    return torch.cat([part[:count] for part, count in zip(gathered.unbind(), rows, strict=True)])


def summed_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' `x`; the gradient flows to this rank's part alone.

    For a function of the sum that every rank computes alike: each rank's gradient is then that of its own part, and the
    parts add up to the whole gradient.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return x + (total - x.detach())
