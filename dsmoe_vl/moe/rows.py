"""Tokens to rows sorted by expert, and back: every row is read once and written once, in both directions of a step.

Autograd's own gradient of a gather is a sum into zeros, row by row; here both ways are a gather and a sum of K rows.

Shapes: T tokens, D width, K experts per token, R = T * K rows. `order` int64 [R]: row r is assignment order[r] of the
assignments [T, K], flattened; `places` int64 [T, K]: the row of each assignment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def by_expert(experts: Tensor, expert_count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the assignments int64 [T, K]: `order`, `places`, and the rows of each expert, int64 [E]."""
    order = experts.flatten().argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(expert_count, dtype=torch.int64, device=order.device)
    counts.scatter_add_(0, experts.flatten(), torch.ones_like(order))
    return order, places.view(experts.shape), counts


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, order // places.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return F.embedding_bag(places, grad.contiguous(), mode="sum"), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor | None, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, gates, order, places)
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        rows, gates, order, places = ctx.saved_tensors
        grad_rows, grad_gates = grad.index_select(0, order // places.shape[1]), None
        if gates is None:
            return grad_rows, None, None, None
        if ctx.needs_input_grad[1]:
            grad_gates = torch.linalg.vecdot(grad_rows, rows).take(places)
        return grad_rows.mul_(gates.flatten().take(order).unsqueeze(1)), grad_gates, None, None


def dispatch(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """x [T, D] -> rows [R, D]."""
    out: Tensor = _Dispatch.apply(x, order, places)
    return out


def combine(rows: Tensor, gates: Tensor | None, order: Tensor, places: Tensor) -> Tensor:
    """rows [R, D], gates [T, K] of the same type -> [T, D], the sum of a token's rows times their gates, if given."""
    out: Tensor = _Combine.apply(rows, gates, order, places)
    return out
