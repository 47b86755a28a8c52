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


def places_of(order: Tensor, top_k: int) -> Tensor:
    """The inverse of `order`."""
    rows = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, rows).view(-1, top_k)


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
    def forward(ctx: Any, rows: Tensor, gates: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, gates, order, places)
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        rows, gates, order, places = ctx.saved_tensors
        grad_rows, grad_gates = grad.index_select(0, order // places.shape[1]), None
        if ctx.needs_input_grad[1]:
            grad_gates = torch.linalg.vecdot(grad_rows, rows).take(places)
        return grad_rows.mul_(gates.flatten().take(order).unsqueeze(1)), grad_gates, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows [N, D] in another order: row i is rows[order[i]]. Both int64 [N], each the inverse of the other."""
    out: Tensor = _Permute.apply(rows, order, inverse)
    return out


def dispatch(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """x [T, D] -> rows [R, D]."""
    out: Tensor = _Dispatch.apply(x, order, places)
    return out


def combine(rows: Tensor, gates: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """rows [R, D], gates [T, K] of the same type -> [T, D], the sum of a token's rows times their gates."""
    out: Tensor = _Combine.apply(rows, gates, order, places)
    return out
