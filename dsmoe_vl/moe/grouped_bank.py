"""E SwiGLU experts on a GPU as one function: one gather into aligned groups, grouped products, one sum back to tokens.

The counterpart of `expert_bank.py`, with the same values and gradients. Rows lie in groups that start where the
grouped product wants them, so no row is moved twice. Gates are applied to the hidden rows, where they are written
anyway; a row of padding has gate 0, so it adds nothing to any gradient. Of all rows, only the products with w1 and w3
are kept. Sizes do not depend on where tokens go, so the host never waits for the device.

`benchmarks/traffic.py` counts the bytes of all this beside the least possible.

Shapes: N tokens, D width, F hidden width, E experts, R rows, P = R + E * ROWS_OF_A_GROUP rows with padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmoe_vl.moe.rows import Assignments, Early, sum_of_rows
from dsmoe_vl.moe.swiglu import swiglu, swiglu_gradients

ROWS_OF_A_GROUP = 8  # a group has a multiple: it starts at 16 bytes in bf16, as the weight gradient's kernel wants it


class Groups(NamedTuple):
    """Rows sorted by expert, each expert's padded to a multiple of ROWS_OF_A_GROUP."""

    places: Tensor  # int64 [R]: where each sorted row lies among the P
    ends: Tensor  # int32 [E]: where each group ends
    size: int  # P

    @classmethod
    def of(cls, counts: Tensor, rows: int) -> Groups:
        """counts int64 [E], the rows of each expert, `rows` in all."""
        padded = (counts + ROWS_OF_A_GROUP - 1) // ROWS_OF_A_GROUP * ROWS_OF_A_GROUP
        shift = (padded - counts).cumsum(0) - (padded - counts)
        places = torch.arange(rows, device=counts.device)
        places += torch.repeat_interleave(shift, counts, output_size=rows)
        return cls(places, padded.cumsum(0).to(torch.int32), rows + len(counts) * ROWS_OF_A_GROUP)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Every row times its group's matrix: x [P, D], weight [E, D, F] -> [P, F]. Rows after the last group are anything.

    Two matrices x [D, P] and weight [P, F] -> [E, D, F]: the product of each group's part.
    """
    if x.is_cuda and x.dtype != torch.bfloat16:  # the kernel exists for bf16 only
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    return torch._grouped_mm(x, weight, offs=ends)


class _GroupedBank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, assignments: Assignments,
        early: Early | None,
    ) -> Tensor:  # fmt: skip
        tokens, order, starts = assignments.tokens, assignments.order, assignments.starts
        groups = Groups.of(assignments.counts, len(order))
        source = tokens.new_zeros(groups.size).index_copy_(0, groups.places, tokens)
        scale = x.new_zeros(groups.size, dtype=torch.float32)
        scale.index_copy_(0, groups.places, gates.take(order).float())
        back = groups.places.take(assignments.rows)
        rows = x.index_select(0, source)
        gate, up = (grouped_product(rows, weight.transpose(1, 2), groups.ends) for weight in (w1, w3))
        out = grouped_product(swiglu(gate, up, scale), w2.transpose(1, 2), groups.ends)
        ctx.weights_train, ctx.early = any(ctx.needs_input_grad[2:5]), early
        # Parameters, not views of them: ZeRO-3 empties them after the forward pass and fills them for the backward.
        ctx.save_for_backward(
            x if ctx.weights_train else None, w1, w2, w3, source, scale, back, starts, groups.ends, gate, up
        )
        return sum_of_rows(out, back, starts).type_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w1, w2, w3, source, scale, back, starts, ends, gate, up = ctx.saved_tensors
        grad_out = grad.index_select(0, source)
        grad_hidden = grouped_product(grad_out, w2, ends)
        hidden, grad_gate, grad_up, grad_scale = swiglu_gradients(grad_hidden, gate, up, scale)
        # Each summed over a token's rows first: there are K times fewer of its sums to add.
        first, third = (
            sum_of_rows(grouped_product(of_rows, weight, ends), back, starts)
            for of_rows, weight in ((grad_gate, w1), (grad_up, w3))
        )
        grad_x, grad_gates = first.add_(third).type_as(grad), grad_scale.take(back).type_as(grad)
        if ctx.early is not None and any(ctx.needs_input_grad[:2]):
            ctx.early(grad_x, grad_gates)
        grad_weights: tuple[Tensor | None, ...] = (None, None, None)
        if ctx.weights_train:
            rows = x.index_select(0, source)
            grad_weights = tuple(
                grouped_product(of_out.t(), of_in, ends).to(w1.dtype)
                for of_out, of_in in ((grad_gate, rows), (grad_out, hidden), (grad_up, rows))
            )
        return grad_x, grad_gates, *grad_weights, None, None


def grouped_bank(
    x: Tensor, gates: Tensor, weights: tuple[Tensor, Tensor, Tensor], assignments: Assignments,
    early: Early | None = None,
) -> Tensor:  # fmt: skip
    """As `expert_bank`."""
    out: Tensor = _GroupedBank.apply(x, gates, *weights, assignments, early)
    return out
