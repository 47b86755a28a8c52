"""Attention inside the segments of a packed sequence, never across them.

Shapes: T tokens of all packs, S segments, H query heads, G key/value heads, d head width, D width.
On CUDA and on one thread of a CPU a variable-length kernel computes the whole batch. On several threads segments of
similar length are padded into a few dense batches for PyTorch's fused attention. `tests/parity/test_attention.py`
compares them with a masked reference.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.cpu_kernels.operators import WIDEST_HEAD, attention, has_attention, has_kernels, rotated_heads
from dsmoe_vl.model.cache import LayerCache
from dsmoe_vl.model.layers import NormOverHeads, RMSNorm
from dsmoe_vl.model.rotation import rotate


@dataclass(frozen=True)
class _Bucket:
    """Segments of similar length: `rows` int64 [S * longest] gathers them, `valid` int64 selects the real rows."""

    segments: int
    longest: int
    rows: Tensor
    valid: Tensor
    key_mask: Tensor | None  # bool [S, 1, 1, longest], None if all lengths are equal


@dataclass(frozen=True)
class _Buckets:
    """Every segment, in buckets; `inverse` int64 [T] leads back from their order to the packed one, None if equal."""

    buckets: tuple[_Bucket, ...]
    inverse: Tensor | None

    @classmethod
    def of(cls, bounds: np.ndarray) -> _Buckets:
        """From cumulative lengths int32 [S + 1]."""
        starts = bounds[:-1].astype(np.int64)
        lengths = np.diff(bounds).astype(np.int64)
        # Lengths above 8 differ by about a quarter at most within a bucket, so the dense batch has little padding.
        bucket_of = np.ceil(np.log2(np.maximum(lengths, 8)) * 3).astype(np.int64)
        buckets, order = [], []
        for bucket_id in np.unique(bucket_of):
            members = np.flatnonzero(bucket_of == bucket_id)
            width = int(lengths[members].max())
            offsets = np.arange(width)
            real = offsets[None, :] < lengths[members][:, None]
            rows = starts[members][:, None] + np.where(real, offsets[None, :], 0)
            order.append(rows[real])
            mask = None if real.all() else torch.from_numpy(real)[:, None, None, :]
            valid = torch.from_numpy(np.flatnonzero(real.ravel()))
            buckets.append(_Bucket(len(members), width, torch.from_numpy(rows.ravel()), valid, mask))
        flat_order = np.concatenate(order)
        in_order = np.array_equal(flat_order, np.arange(len(flat_order)))
        return cls(tuple(buckets), None if in_order else torch.from_numpy(np.argsort(flat_order)))


@dataclass(frozen=True)
class SegmentLayout:
    """Segment boundaries: cumulative lengths int32 [S + 1] and the longest length, once per batch, for every layer."""

    cumulative: Tensor
    longest: int

    @cached_property
    def in_buckets(self) -> _Buckets:
        """For PyTorch's dense attention."""
        return _Buckets.of(self.cumulative.numpy())


def segment_attention(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, causal: bool) -> Tensor:
    """Scaled dot-product attention within segments. q [T, H, d], k and v [T, G, d] -> [T, H, d]."""
    if q.device.type != "cpu":
        return _varlen_attention(q, k, v, layout, causal)
    # One gather is cheaper than three, in the backward pass too. In fp32, because its backward is four times as fast.
    return _packed_attention(torch.cat((q, k, v), dim=1).float(), q.shape[1], layout, causal).type_as(q)


def _packed_attention(packed: Tensor, heads: int, layout: SegmentLayout, causal: bool) -> Tensor:
    """On a CPU, of queries, keys and values in one tensor [T, H + 2 G, d] -> [T, H, d]."""
    if has_attention(packed):
        return attention(packed, layout.cumulative, heads, causal)
    groups = (packed.shape[1] - heads) // 2
    only, *others = layout.in_buckets.buckets
    in_place = not others and only.key_mask is None  # all lengths are equal: packed rows are a dense batch already
    outputs = []
    for bucket in layout.in_buckets.buckets:
        dense = packed if in_place else packed.index_select(0, bucket.rows)
        dense = dense.view(bucket.segments, bucket.longest, heads + 2 * groups, -1).transpose(1, 2)
        queries, keys, values = dense.split((heads, groups, groups), dim=1)
        keys, values = (x.repeat_interleave(heads // groups, dim=1) for x in (keys, values))
        # Padding comes after the real tokens, so a causal mask alone hides it from them.
        mask = None if causal else bucket.key_mask
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
        out = out.transpose(1, 2).reshape(bucket.segments * bucket.longest, heads, -1)
        outputs.append(out if bucket.key_mask is None else out.index_select(0, bucket.valid))
    result = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    inverse = layout.in_buckets.inverse
    return result if inverse is None else result.index_select(0, inverse)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, causal: bool) -> Tensor:
    """The CUDA kernel: FlashAttention over cumulative lengths; half precision only."""
    from torch.nn.attention.varlen import varlen_attn

    half = q.dtype if q.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
    if k.shape[1] < q.shape[1]:
        if _shares_keys():
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    cumulative, longest = layout.cumulative, layout.longest
    q_half, k_half, v_half = (x.to(half) for x in (q, k, v))
    out: Any = varlen_attn(q_half, k_half, v_half, cumulative, cumulative, longest, longest, **options)
    return out.type_as(q)


@cache
def _shares_keys() -> bool:
    """Whether PyTorch's kernel lets query heads share keys and values; if not, says so once."""
    from torch.nn.attention.varlen import varlen_attn

    found = "enable_gqa" in inspect.signature(varlen_attn).parameters
    if not found:  # PyTorch 2.11
        warnings.warn(
            "keys and values are repeated for every query head, with more traffic; PyTorch 2.13 need not",
            stacklevel=2,
        )
    return found


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with QK-norm (Dehghani et al. 2023) and rotary positions.

    head_width: 0 for width / heads. qk_norm: "head", "width" or "none", as `ModelConfig.qk_norm`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        causal: bool,
        *,
        head_width: int = 0,
        qk_norm: str = "head",
        norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.head_width = head_width or width // heads
        self.qk_norm, self.norm_eps = qk_norm, norm_eps
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias=qkv_bias)
        self.q_norm = _qk_norm(qk_norm, heads, self.head_width, norm_eps)
        self.k_norm = _qk_norm(qk_norm, kv_heads, self.head_width, norm_eps)
        self.out = nn.Linear(heads * self.head_width, width, bias=out_bias)

    def forward(
        self, x: Tensor, rotation: Tensor | None, layout: SegmentLayout | None, cache: LayerCache | None = None
    ) -> Tensor:
        """x [T, D], rotation complex64 [T, 1, d / 2] or None -> [T, D]. With a layout, a cache stores the prompts that
        the layout describes; without one, x has the next token of each cached sequence."""
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_width)
        if cache is None and layout is not None and rotation is not None and self._has_kernels(qkv):
            weights = [norm.weight if isinstance(norm, RMSNorm) else None for norm in (self.q_norm, self.k_norm)]
            packed = rotated_heads(qkv, weights[0], weights[1], rotation, self.heads, self.norm_eps)
            return self.out(_packed_attention(packed, self.heads, layout, self.causal).flatten(1))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if layout is None:
            assert cache is not None, "one token a sequence needs a cache"
            return self.out(cache.attend(q, k, v).flatten(1))
        if cache is not None:
            cache.store_prompts(k, v)
        return self.out(segment_attention(q, k, v, layout, self.causal).flatten(1))

    def _has_kernels(self, qkv: Tensor) -> bool:
        """Whether one pass normalises and rotates queries and keys, where they are."""
        return self.qk_norm != "width" and self.head_width <= WIDEST_HEAD and has_kernels(qkv)


def _qk_norm(kind: str, heads: int, head_width: int, eps: float) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return RMSNorm(head_width, eps) if kind == "head" else NormOverHeads(heads * head_width, eps)
