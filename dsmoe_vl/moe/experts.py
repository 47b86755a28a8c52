"""The experts' matrix products: E SwiGLU feed-forwards over tokens sorted by expert.

Shapes: R rows (token-expert assignments, sorted by expert), D width, F hidden width, E experts of this rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.cpu_kernels.operators import has_kernels, silu_product
from dsmoe_vl.moe.expert_bank import expert_bank
from dsmoe_vl.moe.grouped_bank import Groups, grouped_bank, grouped_product
from dsmoe_vl.moe.rows import Assignments, Early, combine, dispatch


class _GroupedLinearOnCPU(torch.autograd.Function):
    """`y[i] = x[i] W[e(i)]^T` with one matrix product per group, written in place.

    torch._grouped_mm runs on a CPU, but its fp32 backward there is 4.5 times slower than these products (4,096 rows,
    192 x 256, eight experts, one core: 15 against 67 GFLOP/s).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight needs no rows
        ctx.counts = counts
        y = x.new_empty(x.shape[0], weight.shape[1])
        for rows, matrix, out in zip(x.split(counts), weight, y.split(counts), strict=True):
            torch.mm(rows, matrix.t(), out=out)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = grad.new_empty(len(grad), weight.shape[2]), None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for rows, grad_rows, out in zip(x.split(ctx.counts), grad.split(ctx.counts), grad_weight, strict=True):
                torch.mm(grad_rows.t(), rows, out=out)
        for matrix, grad_rows, out in zip(weight, grad.split(ctx.counts), grad_x.split(ctx.counts), strict=True):
            torch.mm(grad_rows, matrix, out=out)
        return grad_x, grad_weight, None


Ends = list[int] | Tensor  # rows of each expert; on a GPU the ends of the groups, int32 [E]


def grouped_linear(x: Tensor, weight: Tensor, ends: Ends) -> Tensor:
    """Every row times its expert's matrix. x [R, D], weight [E, F, D] -> [R, F]."""
    if isinstance(ends, list):
        return _GroupedLinearOnCPU.apply(x, weight, ends)
    return grouped_product(x, weight.transpose(1, 2), ends)


def _hidden(gate: Tensor, up: Tensor) -> Tensor:
    """As the experts as one function have it, to the last bit: an export has the outputs of its run."""
    return silu_product(gate, up) if has_kernels(gate) else F.silu(gate) * up


class Expert(nn.Module):
    """One expert of `Experts`, with the same parameter names."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(hidden_width, width))
        self.w2 = nn.Parameter(torch.empty(width, hidden_width))
        self.w3 = nn.Parameter(torch.empty(hidden_width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.linear("w2", _hidden(self.linear("w1", x), self.linear("w3", x)))

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The product with one of the matrices."""
        return F.linear(x, getattr(self, name))


class Experts(nn.Module):
    """E experts `w2(silu(w1 x) * w3 x)`. w1, w2, w3 are the names in DeepSpeed's grouped experts."""

    as_one_function: ClassVar = True  # not in subclasses that compute something else

    def __init__(self, expert_count: int, width: int, hidden_width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(expert_count, hidden_width, width))
        self.w2 = nn.Parameter(torch.empty(expert_count, width, hidden_width))
        self.w3 = nn.Parameter(torch.empty(expert_count, hidden_width, width))

    def forward(self, x: Tensor, gates: Tensor, assignments: Assignments, early: Early | None = None) -> Tensor:
        """Every token's experts times their gates, summed: x [N, D] -> [N, D].

        gates [R] of the assignments, of the type of x. early: called in the backward pass, if the experts are computed
        as one function.
        """
        if self.as_one_function:
            weights = self.w1, self.w2, self.w3
            bank = expert_bank if x.device.type == "cpu" else grouped_bank
            return bank(x, gates, weights, assignments, early)
        return combine(self.of_rows(dispatch(x, assignments), assignments.counts), gates, assignments)

    def of_rows(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [R, D] sorted by expert, counts int [E] rows of each expert -> [R, D]."""
        if x.device.type == "cpu":
            return self._compute(x, counts.tolist())
        groups = Groups.of(counts, len(x))
        rows = x.new_zeros(groups.size, x.shape[1]).index_copy(0, groups.places, x)
        return self._compute(rows, groups.ends).index_select(0, groups.places).type_as(x)

    def _compute(self, x: Tensor, ends: Ends) -> Tensor:
        return self.linear("w2", _hidden(self.linear("w1", x, ends), self.linear("w3", x, ends)), ends)

    def linear(self, name: str, x: Tensor, ends: Ends) -> Tensor:
        """The products with one of the matrices of each expert."""
        return grouped_linear(x, getattr(self, name), ends)

    def single(self) -> Expert:
        """An expert with the parameters of one of these, not initialised."""
        return Expert(self.w2.shape[1], self.w2.shape[2])


class RemainingExperts(Experts):
    """Experts of an exported model, for inference. Null experts are left out: they output zeros at no cost."""

    as_one_function: ClassVar = False
    kept: Tensor  # int64 [E'], indices of the experts whose weights are stored, ascending

    def __init__(self, expert_count: int, width: int, hidden_width: int) -> None:
        super().__init__(expert_count, width, hidden_width)
        self.register_buffer("kept", torch.empty(expert_count, dtype=torch.int64))

    def of_rows(self, x: Tensor, counts: Tensor) -> Tensor:
        """As `Experts.of_rows`, of all E experts: x [R, D], counts int [E] -> [R, D]."""
        is_kept = torch.zeros_like(counts, dtype=torch.bool).index_fill(0, self.kept, True)
        rows = torch.repeat_interleave(is_kept, counts, output_size=x.shape[0]).nonzero().squeeze(-1)
        out = torch.zeros_like(x)
        if len(rows) == 0:
            return out
        return out.index_copy(0, rows, super().of_rows(x.index_select(0, rows), counts[self.kept]))


def null_experts(w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Which experts output zeros for any input: bool [E]. At least one of the three matrices, [E, ...], is all zero."""
    return torch.stack([(weight == 0).flatten(1).all(1) for weight in (w1, w2, w3)]).any(0)
