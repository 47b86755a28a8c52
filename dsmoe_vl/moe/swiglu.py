"""`silu(gate) * up * scale` of rows, and its gradients, each as one pass over memory.

On CUDA they are Triton kernels (`swiglu_kernels.py`); elsewhere, and where Triton is missing, plain operators. Both
compute in float32 and round once. They are registered as operators, so that whatever counts or traces operators sees
one that reads its inputs and writes its outputs.

Shapes: R rows, F width. gate, up, grad [R, F] of one type; scale float32 [R].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_vl.parallel.device import has_triton


@torch.library.custom_op("dsmoe_vl::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """-> [R, F] of the type of gate."""
    if gate.is_cuda and has_triton():
        from dsmoe_vl.moe.swiglu_kernels import forward

        return forward(gate.contiguous(), up.contiguous(), scale)
    return (torch.nn.functional.silu(gate.float()) * up * scale.unsqueeze(1)).type_as(gate)


@torch.library.custom_op("dsmoe_vl::swiglu_gradients", mutates_args=())
def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of the output: the output itself, which costs no read more, and the gradients of gate and up
    [R, F] and of scale, float32 [R]."""
    if gate.is_cuda and has_triton():
        from dsmoe_vl.moe.swiglu_kernels import backward

        return backward(grad.contiguous(), gate.contiguous(), up.contiguous(), scale)
    share = gate.float().sigmoid()
    silu = gate * share
    hidden = silu * up
    scaled = grad * scale.unsqueeze(1)
    grad_gate = scaled * up * (share + silu * (1 - share))
    out, grad_up = hidden * scale.unsqueeze(1), scaled * silu
    return out.type_as(gate), grad_gate.type_as(gate), grad_up.type_as(gate), (grad * hidden).sum(1)


@swiglu.register_fake
def _(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(gate)


@swiglu_gradients.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(scale)
