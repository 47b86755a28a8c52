"""Tokens to rows sorted by expert, and back: every row is read once and written once, in both directions of a step.

Autograd's own gradient of a gather is a sum into zeros, row by row; here both ways are a gather and a sum of a token's
rows.

Shapes: N tokens, D width, E experts, R rows: one for each assignment of a token to an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Takes the gradients of the experts' x [N, D] and gates [R] before those of their weights are computed.
Early = Callable[[Tensor, Tensor], None]


class Assignments(NamedTuple):
    """Which expert computes which token. Assignments are numbered token by token, rows expert by expert."""

    tokens: Tensor  # int64 [R]: the token of each row
    order: Tensor  # int64 [R]: the assignment of each row
    rows: Tensor  # int64 [R]: the row of each assignment
    starts: Tensor  # int64 [N]: the first assignment of each token
    counts: Tensor  # int64 [E]: the rows of each expert

    @classmethod
    def of(cls, experts: Tensor, expert_count: int) -> Assignments:
        """K experts for every token: int64 [N, K]."""
        tokens, top_k = experts.shape
        order, rows, counts = _sorted(experts.flatten(), expert_count)
        starts = torch.arange(0, tokens * top_k, top_k, device=experts.device)
        return cls(order // top_k, order, rows, starts, counts)

    @classmethod
    def of_chosen(cls, experts: Tensor, chosen: Tensor, count: int, expert_count: int) -> tuple[Assignments, Tensor]:
        """Only the `count` experts that `chosen` marks, bool [N, K], of experts int64 [N, K].

        Also returns where they are in [N, K], flattened: int64 [R].
        """
        places = torch.nonzero_static(chosen.flatten(), size=count).squeeze(1)
        order, rows, counts = _sorted(experts.take(places), expert_count)
        of_token = chosen.sum(1)
        tokens = (places // chosen.shape[1]).take(order)
        return cls(tokens, order, rows, of_token.cumsum(0) - of_token, counts), places


def _sorted(experts: Tensor, expert_count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, rows and counts of assignments to experts int64 [R]."""
    order = experts.argsort(stable=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = order.new_zeros(expert_count).scatter_add_(0, experts, torch.ones_like(order))
    return order, rows, counts


def sum_of_rows(values: Tensor, rows: Tensor, starts: Tensor, gates: Tensor | None = None) -> Tensor:
    """The sum of each token's rows, times their gates if given: values [R, D], rows and gates [R'] in the order of the
    tokens, starts int64 [N] -> [N, D]."""
    return F.embedding_bag(rows, values, starts, mode="sum", per_sample_weights=gates)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, assignments: Assignments) -> Tensor:
        ctx.save_for_backward(assignments.rows, assignments.starts)
        return x.index_select(0, assignments.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return sum_of_rows(grad.contiguous(), *ctx.saved_tensors), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, assignments: Assignments) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, gates, *assignments)
        return sum_of_rows(rows, assignments.rows, assignments.starts, gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        rows, gates, *parts = ctx.saved_tensors
        assignments = Assignments(*parts)
        grad_rows, grad_gates = grad.index_select(0, assignments.tokens), None
        if ctx.needs_input_grad[1]:
            grad_gates = torch.linalg.vecdot(grad_rows, rows).take(assignments.rows)
        return grad_rows.mul_(gates.take(assignments.order).unsqueeze(1)), grad_gates, None


def dispatch(x: Tensor, assignments: Assignments) -> Tensor:
    """x [N, D] -> rows [R, D]."""
    out: Tensor = _Dispatch.apply(x, assignments)
    return out


def combine(rows: Tensor, gates: Tensor, assignments: Assignments) -> Tensor:
    """rows [R, D], gates [R] of the assignments, of the same type -> [N, D], the sum of a token's rows times gates."""
    out: Tensor = _Combine.apply(rows, gates, assignments)
    return out
