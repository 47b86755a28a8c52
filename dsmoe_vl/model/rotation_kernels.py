"""The Triton kernel of `rotation.py`: a program a token and head.

Imported only where Triton is. With TRITON_INTERPRET=1 set before, it runs on tensors of a CPU, for tests.

Shapes: T tokens, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x: Any, parts: Any, out: Any, token_stride: Any, head_stride: Any, heads: Any, sign: Any,
    pairs: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < pairs
    source = x + token * token_stride + head * head_stride + 2 * pair
    turn = parts + token * pairs * 2 + 2 * pair
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + 1, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(turn, mask=inside, other=0.0)
    sine = tl.load(turn + 1, mask=inside, other=0.0) * sign
    target = out + ((token * heads + head) * pairs + pair) * 2
    tl.store(target, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(target + 1, (first * sine + second * cosine).to(out.dtype.element_ty), mask=inside)


def rotated(x: Tensor, parts: Tensor, back: bool) -> Tensor:
    """As `rotation.py: rotated`. x may be a part of a larger tensor: [T, H, d] with features side by side."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        pairs, sign = width // 2, -1.0 if back else 1.0
        _rotate[(tokens, heads)](
            x, parts.contiguous(), out, x.stride(0), x.stride(1), heads, sign, pairs,
            BLOCK=int(triton.next_power_of_2(pairs)),
        )  # fmt: skip
    return out
