"""Layers, vision encoder and connector of a model that was trained with dsmoe_vl, for transformers.

Shapes: B sequences, T tokens, D width, H heads, d head width, N patches of a picture by row and column, p side of a
patch, Dv width of the encoder.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
_RESIZES: dict[str, dict[str, Any]] = {
    "bilinear": {"mode": "bilinear", "align_corners": False, "antialias": True},
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "align_corners": {"mode": "bilinear", "align_corners": True},
}


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class NormOverHeads(RMSNorm):
    """Over the features of all heads together."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., H, d] -> [..., H, d]."""
        return super().forward(x.flatten(-2)).view_as(x)


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`; with `gated` times a learned sigmoid of x."""

    def __init__(self, width: int, hidden: int, gated: bool = False) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.gate = nn.Linear(width, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out = self.down(F.silu(gate) * up)
        return out if self.gate is None else out * self.gate(x).sigmoid()


class GELUFeedForward(nn.Module):
    """Two matrices with biases."""

    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(width, hidden), nn.Linear(hidden, width), kind

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(_ACTIVATIONS[self.kind](self.up(x)))


class Scale(nn.Module):
    """A learned factor per feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.weight


def frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """Of rotary embeddings, radians a position: [count]."""
    return base ** (-torch.arange(count, dtype=torch.float32, device=device) / count)


def rotation(angles: Tensor, magnitude: float = 1.0) -> Tensor:
    """Complex numbers that turn by the angles, and make `magnitude` times as large."""
    return torch.polar(torch.full_like(angles, magnitude), angles)


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate neighbouring pairs of features: x [..., T, H, d] by complex numbers [..., T, d / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * turns.unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def _sinusoids(values: Tensor, count: int, shortest: float, longest: float) -> Tensor:
    exponent = torch.linspace(0, 1, count, device=values.device)
    angles = 2 * math.pi * values.unsqueeze(-1) / (shortest * (longest / shortest) ** exponent)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and norms of queries and keys."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_width: int, qk_norm: str, eps: float, bias: bool,
        out_bias: bool, index: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.head_width, self.index = heads, kv_heads, head_width, index
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_width, bias=bias)
        self.q_norm, self.k_norm = (self._norm(qk_norm, count, head_width, eps) for count in (heads, kv_heads))
        self.out = nn.Linear(heads * head_width, width, bias=out_bias)

    @staticmethod
    def _norm(kind: str, heads: int, head_width: int, eps: float) -> nn.Module:
        if kind == "none":
            return nn.Identity()
        return RMSNorm(head_width, eps) if kind == "head" else NormOverHeads(heads * head_width, eps)

    def forward(self, x: Tensor, turns: Tensor | None, mask: Tensor | None, cache: Any = None) -> Tensor:
        """x [B, T, D], turns complex [B, T, d / 2], mask bool [B, 1, T, K] -> [B, T, D]."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_width))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if turns is not None:
            q, k = _rotate(q, turns), _rotate(k, turns)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def _vision_norm(vision: dict[str, Any]) -> nn.Module:
    kind = RMSNorm if vision["norm"] == "rms" else nn.LayerNorm
    return kind(vision["width"], eps=vision["norm_eps"])


class VisionLayer(nn.Module):
    """Attention within a picture, then a feed-forward."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        width, heads, bias = vision["width"], vision["heads"], vision["bias"]
        qk_norm = "head" if vision["qk_norm"] else "none"
        self.attention_norm, self.feed_forward_norm = _vision_norm(vision), _vision_norm(vision)
        self.attention = Attention(width, heads, heads, width // heads, qk_norm, vision["norm_eps"], bias, bias)
        scales = (Scale(width) if vision["layer_scale"] else nn.Identity() for _ in range(2))
        self.attention_scale, self.feed_forward_scale = scales
        gated = vision["ffn"] == "swiglu"
        sizes = width, vision["ffn_width"]
        self.feed_forward: nn.Module = SwiGLU(*sizes) if gated else GELUFeedForward(*sizes, vision["ffn"])

    def forward(self, x: Tensor, turns: Tensor | None) -> Tensor:
        """x [1, N, Dv] -> [1, N, Dv]."""
        x = x + self.attention_scale(self.attention(self.attention_norm(x), turns, None))
        return x + self.feed_forward_scale(self.feed_forward(self.feed_forward_norm(x)))


class Positions(nn.Module):
    """A table of g x g positions, resized to a picture's grid."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.side, self.resize = vision["position_grid"], vision["position_resize"]
        self.weight = nn.Parameter(torch.empty(self.side**2, vision["width"]))

    def forward(self, rows: int, columns: int) -> Tensor:
        """-> [N, Dv]."""
        table = self.weight.float().view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        return F.interpolate(table, (rows, columns), **_RESIZES[self.resize]).flatten(2)[0].t().to(self.weight.dtype)


class VisionEncoder(nn.Module):
    """A transformer over the patches of one picture."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        width, self.side, self.rope_base = vision["width"], vision["patch_size"], vision["rope_base"]
        self.head_width, self.is_rotary = width // vision["heads"], "rotary" in vision["positions"]
        self.patch_embedding = nn.Linear(3 * self.side**2, width)
        self.position = Positions(vision) if "learned" in vision["positions"] else None
        prefix = vision["prefix_tokens"]
        self.prefix = nn.Parameter(torch.empty(prefix, width)) if prefix else None
        self.embedding_norm = _vision_norm(vision) if vision["pre_norm"] else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision["layers"]))
        self.norm = _vision_norm(vision) if vision["final_norm"] else nn.Identity()

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """patches [N, p * p * 3] from -1 to 1, by row, column and channel -> [N, Dv]."""
        pixels = patches.view(-1, self.side, self.side, 3).permute(0, 3, 1, 2).flatten(1)
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        if self.position is not None:
            x = x + self.position(rows, columns)
        angles = None
        if self.is_rotary:
            slow = frequencies(self.head_width // 4, self.rope_base, x.device)
            grid = torch.cartesian_prod(*(torch.arange(n, device=x.device).float() for n in (rows, columns)))
            angles = (grid.view(-1, 2, 1) * slow).flatten(1)
        before = 0 if self.prefix is None else len(self.prefix)
        if self.prefix is not None:
            x = torch.cat((self.prefix, x))
            angles = None if angles is None else F.pad(angles, (0, 0, before, 0))
        x = self.embedding_norm(x)[None]
        turns = None if angles is None else rotation(angles)
        for layer in self.layers:
            x = layer(x, turns)
        return self.norm(x)[0, before:]


class Connector(nn.Module):
    """Cells of merge x merge patches to vectors of the decoder's width."""

    def __init__(self, vision: dict[str, Any], width: int) -> None:
        super().__init__()
        self.merge, kind, eps = vision["merge"], vision["connector_norm"], vision["connector_norm_eps"]
        joined = vision["width"] * self.merge**2
        self.patch_norm = nn.LayerNorm(vision["width"], eps) if kind == "patch" else nn.Identity()
        self.cell_norm = nn.LayerNorm(joined, eps) if kind == "joined" else nn.Identity()
        hidden = vision["connector_width"] or width
        self.up, self.down = nn.Linear(joined, hidden), nn.Linear(hidden, width)
        placed = vision["place_and_time"]
        self.place = nn.Linear(32, width, bias=False) if placed else None
        self.time = nn.Linear(32, width, bias=False) if placed else None  # of frames: zero for still images

    def forward(self, features: Tensor, rows: int, columns: int) -> Tensor:
        """features [N, Dv] -> [N / merge**2, D]."""
        down, across = rows // self.merge, columns // self.merge
        grid = self.patch_norm(features).view(down, self.merge, across, self.merge, -1)
        cells = self.down(F.gelu(self.up(self.cell_norm(grid.transpose(1, 2).reshape(down * across, -1)))))
        if self.place is None:
            return cells
        places = torch.cartesian_prod(*(torch.arange(n, device=cells.device).float() for n in (down, across)))
        return cells + self.place(_sinusoids(places.view(-1, 2), 8, 2.0, 256.0).flatten(1).type_as(cells))
