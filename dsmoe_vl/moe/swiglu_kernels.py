"""Triton kernels of `swiglu.py`: a program a row, in blocks of its width.

Imported only where Triton is. With TRITON_INTERPRET=1 set before, they run on tensors of a CPU, for tests.

Shapes: R rows, F width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns


@triton.jit
def _forward(gate: Any, up: Any, scale: Any, out: Any, width: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    of_row = tl.load(scale + row)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside, place = column < width, row * width + column
        first = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        third = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        result = first * tl.sigmoid(first) * third * of_row
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad: Any, gate: Any, up: Any, scale: Any, out: Any, grad_gate: Any, grad_up: Any, grad_scale: Any,
    width: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    of_row = tl.load(scale + row)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside, place = column < width, row * width + column
        of_out = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        third = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(first)
        silu = first * share
        hidden = silu * third
        total += of_out * hidden
        scaled = of_out * of_row
        tl.store(out + place, (hidden * of_row).to(out.dtype.element_ty), mask=inside)
        of_gate = scaled * third * (share + silu * (1 - share))
        tl.store(grad_gate + place, of_gate.to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + place, (scaled * silu).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_scale + row, tl.sum(total, 0))


def forward(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """As `swiglu`."""
    out = torch.empty_like(gate)
    rows, width = gate.shape
    if rows:
        _forward[(rows,)](gate, up, scale, out, width, BLOCK=_block(width))
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `swiglu_gradients`."""
    out, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
    grad_scale = torch.empty_like(scale)
    rows, width = gate.shape
    if rows:
        _backward[(rows,)](grad, gate, up, scale, out, grad_gate, grad_up, grad_scale, width, BLOCK=_block(width))
    return out, grad_gate, grad_up, grad_scale


def _block(width: int) -> int:
    return min(_BLOCK, int(triton.next_power_of_2(width)))
