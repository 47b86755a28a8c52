"""E SwiGLU experts on a CPU as one function: rows to the experts, their products, and back to tokens.

The rows are gathered, multiplied and activated in pieces of several experts, so what is between two products stays in
the processor's cache, and an operator starts once for a piece, not for every expert. Of all rows, only the products
with w1 and w3 are kept; the backward pass gathers the rows again and makes SiLU again, which takes about as long as
writing and reading them where experts are wide, and less where they are narrow. The gradient of a gate needs no output
row either: `<dy, w2 h> = <w2^T dy, h>`.

Shapes: N tokens, D width, F hidden width, E experts, R rows, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.cpu_kernels.operators import swiglu_rows, swiglu_rows_gradients
from dsmoe_vl.moe.rows import Assignments, Early, sum_of_rows

_PIECE = 1024  # rows; with 64 or 128 for an expert faster than 256 or 512, with 512 some percent slower


def pieces_of(counts: list[int]) -> list[tuple[slice, slice]]:
    """Neighbouring experts with at most `_PIECE` rows together, or one with more: which experts, and which rows."""
    pieces, expert, row, end = [], 0, 0, 0
    for index, count in enumerate(counts):
        if end > row and end + count - row > _PIECE:
            pieces.append((slice(expert, index), slice(row, end)))
            expert, row = index, end
        end += count
    return [*pieces, (slice(expert, len(counts)), slice(row, end))]


def _buffers(like: Tensor, pieces: list[tuple[slice, slice]], *widths: int) -> list[Tensor]:
    """Room for the rows of any piece, once for each width."""
    most = max(rows.stop - rows.start for _, rows in pieces)
    return [like.new_empty(most, width) for width in widths]


class _ExpertBank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, assignments: Assignments,
        early: Early | None,
    ) -> Tensor:  # fmt: skip
        (hidden_width, width), count = w1.shape[1:], len(assignments.rows)
        counts: list[int] = assignments.counts.tolist()
        pieces = pieces_of(counts)
        gate, up = x.new_empty(count, hidden_width), x.new_empty(count, hidden_width)
        out = x.new_empty(count, width)
        x_buffer, hidden_buffer = _buffers(x, pieces, width, hidden_width)
        w1_t, w2_t, w3_t = (weight.transpose(1, 2).unbind() for weight in (w1, w2, w3))
        for experts, rows in pieces:
            split, size = counts[experts], rows.stop - rows.start
            x_rows = torch.index_select(x, 0, assignments.tokens[rows], out=x_buffer[:size])
            for of_x, first, third, to_gate, to_up in zip(
                x_rows.split(split), w1_t[experts], w3_t[experts], gate[rows].split(split), up[rows].split(split),
                strict=True,
            ):  # fmt: skip
                torch.mm(of_x, first, out=to_gate)
                torch.mm(of_x, third, out=to_up)
            hidden = swiglu_rows(gate[rows], up[rows], hidden_buffer[:size])
            for of_hidden, second, to in zip(hidden.split(split), w2_t[experts], out[rows].split(split), strict=True):
                torch.mm(of_hidden, second, out=to)
        weights_train = any(ctx.needs_input_grad[2:5])
        # Parameters, not views of them: ZeRO-3 empties them after the forward pass and fills them for the backward.
        ctx.save_for_backward(x if weights_train else None, gates, w1, w2, w3, gate, up, *assignments)
        ctx.counts, ctx.weights_train, ctx.early = counts, weights_train, early
        return sum_of_rows(out, assignments.rows, assignments.starts, gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gates, w1, w2, w3, gate, up, *parts = ctx.saved_tensors
        assignments, counts, weights_train = Assignments(*parts), ctx.counts, ctx.weights_train
        (hidden_width, width), pieces = w1.shape[1:], pieces_of(counts)
        grad_rows = grad.new_empty(len(gate), width)
        scale = gates.take(assignments.order)
        grad_scale = torch.empty_like(scale)
        grad_weights = [torch.empty_like(weight) for weight in (w1, w2, w3)] if weights_train else []
        later = weights_train and ctx.early is not None
        out_buffer, x_buffer = _buffers(grad, pieces, width, width)
        whole = [(slice(0, len(counts)), slice(0, len(gate)))]
        hidden_buffers = _buffers(grad, whole if later else pieces, *[hidden_width] * 3)

        def hidden_parts(rows: slice) -> list[Tensor]:
            """Room for hidden rows, and for the gradients of the products with w1 and w3."""
            return [buffer[rows] if later else buffer[: rows.stop - rows.start] for buffer in hidden_buffers]

        def gradients_of_outputs(rows: slice) -> Tensor:
            return torch.index_select(grad, 0, assignments.tokens[rows], out=out_buffer[: rows.stop - rows.start])

        def weights_of(experts: slice, rows: slice, grad_out: Tensor) -> Iterator[None]:
            """Gradients of the weights of one expert after another, each when it is asked for."""
            of_x = torch.index_select(x, 0, assignments.tokens[rows], out=x_buffer[: rows.stop - rows.start])
            of_rows = (part.split(counts[experts]) for part in (of_x, grad_out, *hidden_parts(rows)))
            for x_rows, out_rows, hidden, of_gate, of_up, first, second, third in zip(
                *of_rows, *(weight[experts] for weight in grad_weights), strict=True
            ):
                torch.mm(of_gate.t(), x_rows, out=first)
                torch.mm(out_rows.t(), hidden, out=second)
                torch.mm(of_up.t(), x_rows, out=third)
                yield

        for experts, rows in pieces:
            split, grad_out = counts[experts], gradients_of_outputs(rows)
            hidden, grad_gate, grad_up = hidden_parts(rows)
            for of_out, second, to in zip(grad_out.split(split), w2[experts], hidden.split(split), strict=True):
                torch.mm(of_out, second, out=to)  # the gradient of the hidden rows, then they themselves
            swiglu_rows_gradients(hidden, gate[rows], up[rows], scale[rows], grad_gate, grad_up, grad_scale[rows])
            of_weights = weights_of(experts, rows, grad_out) if weights_train and not later else iter(())
            # All products of an expert one after another, while its rows are in the nearest cache.
            for of_gate, of_up, first, third, to in zip(
                grad_gate.split(split), grad_up.split(split), w1[experts], w3[experts], grad_rows[rows].split(split),
                strict=True,
            ):  # fmt: skip
                torch.mm(of_gate, first, out=to)
                torch.addmm(to, of_up, third, out=to)
                next(of_weights, None)
        grad_x = sum_of_rows(grad_rows, assignments.rows, assignments.starts)
        grad_gates = grad_scale.take(assignments.rows)
        if ctx.early is not None and any(ctx.needs_input_grad[:2]):
            ctx.early(grad_x, grad_gates)
        for experts, rows in pieces if later else ():
            for _ in weights_of(experts, rows, gradients_of_outputs(rows)):
                pass
        return grad_x, grad_gates, *(grad_weights or (None, None, None)), None, None


def expert_bank(
    x: Tensor, gates: Tensor, weights: tuple[Tensor, Tensor, Tensor], assignments: Assignments,
    early: Early | None = None,
) -> Tensor:  # fmt: skip
    """Every token's experts `w2(silu(w1 x) * w3 x)` times their gates, summed: x [N, D] -> [N, D].

    gates [R] of the assignments, of the type of x. weights: w1 [E, F, D], w2 [E, D, F], w3 [E, F, D].
    """
    out: Tensor = _ExpertBank.apply(x, gates, *weights, assignments, early)
    return out
