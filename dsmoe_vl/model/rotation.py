"""Rotating neighbouring pairs of features (Su et al. 2021, eq. 34).

On a GPU one Triton kernel (`rotation_kernels.py`) reads each feature and writes it once; complex numbers in PyTorch
move it five times, in fp32. Elsewhere, and without Triton, it is a product of complex numbers. Both compute in fp32 and
round once. The kernel is registered as an operator, so that whatever traces operators sees one.

Shapes: T tokens, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.parallel.device import has_triton


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [T, H, d], rotation complex64 [T, 1, d / 2] -> [T, H, d] of the type of x. Rotations get no gradient."""
    if x.is_cuda and has_triton():
        return rotated(x, torch.view_as_real(rotation), False)
    return _product(x, rotation)


def _product(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


@torch.library.custom_op("dsmoe_vl::rotated", mutates_args=())
def rotated(x: Tensor, parts: Tensor, back: bool) -> Tensor:
    """As `rotate`, by parts float32 [T, 1, d / 2, 2], real and imaginary. `back`: by the conjugates, for gradients."""
    if x.is_cuda:
        from dsmoe_vl.model.rotation_kernels import rotated as kernel

        return kernel(x, parts, back)
    rotation = torch.view_as_complex(parts)
    return _product(x.contiguous(), rotation.conj() if back else rotation)


@rotated.register_fake
def _(x: Tensor, parts: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    _, parts, ctx.back = inputs
    ctx.save_for_backward(parts)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (parts,) = ctx.saved_tensors
    return rotated(grad, parts, not ctx.back), None, None


rotated.register_autograd(_gradient, setup_context=_keep)
