"""The kernels as functions of tensors, with gradients.

They take float32 on a CPU, and one thread each. PyTorch's composed operators, which may use several, take their place
elsewhere: `has_kernels` says where.

Shapes: T rows, S segments, D width of a row, H query heads, G key/value heads, d head width, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.cpu_kernels.library import library

_THREADS = 8  # up to so many, PyTorch's operators are not faster: on one thread they take 3 to 10 times as long
WIDEST_HEAD = 512  # of `rotated_heads`, as in kernels.c

_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


def has_kernels(x: Tensor) -> bool:
    """Whether the functions below can and should take `x`."""
    is_theirs = x.device.type == "cpu" and x.dtype == torch.float32
    return is_theirs and torch.get_num_threads() <= _THREADS and library() is not None


def has_attention(x: Tensor) -> bool:
    """Whether `attention` can and should take `x`: it uses one thread, and PyTorch's attention as many as there are."""
    return torch.get_num_threads() == 1 and has_kernels(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension: [..., D] -> [..., D]."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`, of neighbours in one tensor: [T, 2 F] -> [T, F]."""
    out: Tensor = _SwiGLU.apply(gate_up)
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, [T, F] each -> [T, F]; the same numbers as `swiglu`."""
    out: Tensor = _SiLUProduct.apply(gate, up)
    return out


def rotated_heads(
    packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, turn: Tensor, heads: int, eps: float
) -> Tensor:
    """Queries, keys and values [T, H + 2 G, d], the first two normalised as `rms_norm` (if there are weights [d]) and
    rotated by complex64 [T, 1, d / 2]. d is even and at most WIDEST_HEAD. Rotations get no gradient."""
    out: Tensor = _RotatedHeads.apply(packed, q_weight, k_weight, turn, heads, eps)
    return out


def attention(packed: Tensor, bounds: Tensor, heads: int, causal: bool) -> Tensor:
    """Attention within segments, of queries, keys and values [T, H + 2 G, d] -> [T, H, d]. Segment i has the rows from
    `bounds[i]` to `bounds[i + 1]`, int32 [S + 1]; H is a multiple of G.

    Raises:
        MemoryError: There is none for a segment's keys and values and a part of its scores.
    """
    out: Tensor = _Attention.apply(packed, bounds, heads, causal)
    return out


def swiglu_rows(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """`silu(gate) * up` into `out`, all contiguous [T, F] of any type; without a graph."""
    if not has_kernels(gate):
        return _silu(gate, out=out).mul_(up)
    width = gate.shape[-1]
    _kernels().swiglu(*_pointers(gate, up), width, out.data_ptr(), gate.numel() // width, width)
    return out


def swiglu_rows_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, scale: Tensor, grad_gate: Tensor, grad_up: Tensor, grad_scale: Tensor
) -> None:
    """From the gradient of `silu(gate) * up * scale`: the gradients, and the value itself in the place of `grad`. All
    contiguous [T, F] of any type, scale [T]; without a graph."""
    if has_kernels(gate):
        pointers = _pointers(grad, gate, up, scale, grad_gate, grad_up, grad_scale)
        _kernels().scaled_swiglu_gradients(*pointers, *gate.shape)
        return
    of_rows, silu = scale.unsqueeze(1), _silu(gate, out=grad_up)
    hidden = silu * up
    torch.sum(torch.mul(grad, hidden, out=grad_gate), 1, out=grad_scale)
    grad.mul_(of_rows)
    grad_up.mul_(grad)
    _silu_backward(grad.mul_(up), gate, grad_input=grad_gate)
    torch.mul(hidden, of_rows, out=grad)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, width = x.contiguous(), x.shape[-1]
        out, rows = torch.empty_like(x), x.numel() // width
        inverse = x.new_empty(rows)
        _kernels().rms_norm(*_pointers(x, weight, out, inverse), rows, width, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        grad_x, grad_weight, sums = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        pointers = _pointers(grad.contiguous(), x, weight, inverse, grad_x, grad_weight, sums)
        _kernels().rms_norm_gradients(*pointers, len(inverse), len(weight))
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, width = gate_up.numel() // gate_up.shape[-1], gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        gate, up = _halves(gate_up, width)
        _kernels().swiglu(gate, up, 2 * width, out.data_ptr(), rows, width)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        grad, out, width = grad.contiguous(), torch.empty_like(gate_up), grad.shape[-1]
        halves = *_halves(gate_up, width), 2 * width, *_halves(out, width), 2 * width
        _kernels().swiglu_gradients(grad.data_ptr(), *halves, grad.numel() // width, width)
        return out


class _SiLUProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu_rows(gate, up, torch.empty_like(gate))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        width, grad_gate, grad_up = gate.shape[-1], torch.empty_like(gate), torch.empty_like(up)
        read, written = _pointers(grad.contiguous(), gate, up), _pointers(grad_gate, grad_up)
        _kernels().swiglu_gradients(*read, width, *written, width, gate.numel() // width, width)
        return grad_gate, grad_up


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, turn: Tensor, heads: int, eps: float
    ) -> Tensor:
        packed, turn = packed.contiguous(), torch.view_as_real(turn).contiguous()
        rows, every, width = packed.shape
        keys = (every - heads) // 2
        out = torch.empty_like(packed)
        inverse = None if q_weight is None else packed.new_empty(rows, heads + keys)
        pointers = _pointers(packed, q_weight, k_weight, turn, out, inverse)
        _kernels().heads(*pointers, rows, heads, keys, width, eps)
        ctx.save_for_backward(None if q_weight is None else packed, q_weight, k_weight, turn, inverse)
        ctx.heads, ctx.keys = heads, keys
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed, q_weight, k_weight, turn, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        grad_packed, (rows, _, width) = torch.empty_like(grad), grad.shape
        weights = sums = None
        if q_weight is not None:
            weights, sums = grad.new_empty(2, width), grad.new_empty(2, width)
        pointers = _pointers(grad, packed, q_weight, k_weight, turn, inverse, grad_packed, weights, sums)
        _kernels().heads_gradients(*pointers, rows, ctx.heads, ctx.keys, width)
        of_weights = (None, None) if weights is None else weights.unbind()
        return grad_packed, *of_weights, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, bounds: Tensor, heads: int, causal: bool) -> Tensor:
        packed, bounds = packed.contiguous(), bounds.contiguous()
        rows, every, width = packed.shape
        assert bounds.dtype == torch.int32 and int(bounds[0]) == 0 and int(bounds[-1]) == rows, "segments of other rows"
        ctx.sizes = len(bounds) - 1, heads, (every - heads) // 2, width, causal
        out, logs = packed.new_empty(rows, heads, width), packed.new_empty(rows, heads)
        _or_no_memory(_kernels().attention(*_pointers(packed, bounds, out, logs), *ctx.sizes))
        ctx.save_for_backward(packed, bounds, logs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        packed, bounds, logs = ctx.saved_tensors
        grad, grad_packed = grad.contiguous(), torch.empty_like(packed)
        pointers = _pointers(grad, packed, bounds, logs, grad_packed)
        _or_no_memory(_kernels().attention_gradients(*pointers, *ctx.sizes))
        return grad_packed, None, None, None


def _or_no_memory(failed: int) -> None:
    if failed:
        raise MemoryError("attention within segments: no memory for the keys and values of the longest one")


def _kernels() -> Any:
    found = library()
    assert found is not None, "has_kernels was not asked"
    return found


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _halves(rows: Tensor, width: int) -> tuple[int, int]:
    """Where gate and up of the first row begin."""
    first = rows.data_ptr()
    return first, first + width * rows.element_size()
