"""The vision encoder and the connector.

Shapes: N patches of all pictures, C = 3 * patch_size**2, Dv encoder width, Q = N / merge**2 cells, D decoder width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmoe_vl.config.model import VisionConfig
from dsmoe_vl.model.attention import Attention, SegmentLayout
from dsmoe_vl.model.layers import GELU_KINDS, RMSNorm, Scale, SwiGLU, rotary_2d
from dsmoe_vl.model.positions import LearnedPositions

_TIME_PERIODS = 16
_SECONDS = (0.5, 1024.0)  # shortest and longest period
_PLACE_PERIODS = 8  # each for row and column
_CELLS = (2.0, 256.0)


class VisionLayer(nn.Module):
    """Pre-norm attention within a picture, then a feed-forward."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.attention_norm = _norm(config)
        self.attention = Attention(
            width, config.heads, config.heads, causal=False, qk_norm="head" if config.qk_norm else "none",
            norm_eps=config.norm_eps, qkv_bias=config.bias, out_bias=config.bias,
        )  # fmt: skip
        self.attention_scale = Scale(width) if config.layer_scale else nn.Identity()
        self.feed_forward_norm = _norm(config)
        gated = config.ffn == "swiglu"
        self.feed_forward = (SwiGLU if gated else GELU_KINDS[config.ffn])(width, config.ffn_width)
        self.feed_forward_scale = Scale(width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor | None, layout: SegmentLayout) -> Tensor:
        """x [N, Dv] -> [N, Dv]."""
        x = x + self.attention_scale(self.attention(self.attention_norm(x), rotation, layout))
        return x + self.feed_forward_scale(self.feed_forward(self.feed_forward_norm(x)))


class VisionEncoder(nn.Module):
    """A transformer over the patches of each picture, at the picture's own resolution and aspect ratio."""

    def __init__(self, config: VisionConfig, recomputes_layers: bool = False) -> None:
        super().__init__()
        self.recomputes_layers = recomputes_layers
        self.head_width, self.rope_base = config.width // config.heads, config.rope_base
        self.is_rotary = "rotary" in config.positions
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.width)
        self.position = None
        if "learned" in config.positions:
            self.position = LearnedPositions(config.position_grid, config.width, config.position_resize)
        self.prefix = nn.Parameter(torch.empty(config.prefix_tokens, config.width)) if config.prefix_tokens else None
        self.embedding_norm = _norm(config) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))
        self.norm = _norm(config) if config.final_norm else nn.Identity()
        self.taps = config.taps

    def forward(self, patches: Tensor, positions: Tensor, layout: SegmentLayout) -> tuple[Tensor, ...]:
        """patches uint8 [N, C], positions int64 [N, 2], layout of the pictures -> the features [N, Dv], and those that
        leave each layer of `taps`."""
        pixels = patches.to(self.patch_embedding.weight.dtype).div_(127.5).sub_(1.0)
        x = self.patch_embedding(pixels)
        if self.position is not None:
            x = x + self.position(positions, _sizes(positions, layout))
        rotation = rotary_2d(positions, self.head_width, self.rope_base) if self.is_rotary else None
        if self.prefix is None:
            return self._encode(x, rotation, layout)
        own, first, longer = _places_after(layout, len(self.prefix), len(x))
        rows = len(own) + len(first) * len(self.prefix)
        before = (first.unsqueeze(-1) + torch.arange(len(self.prefix), device=x.device)).flatten()
        x = x.new_zeros(rows, x.shape[1]).index_copy(0, own, x)
        x = x.index_copy(0, before, self.prefix.type_as(x).repeat(len(first), 1))
        if rotation is not None:  # the prefix has no place, so it is not rotated
            rotation = torch.ones(rows, *rotation.shape[1:], dtype=rotation.dtype, device=x.device).index_copy(
                0, own, rotation
            )
        return tuple(found.index_select(0, own) for found in self._encode(x, rotation, longer))

    def _encode(self, x: Tensor, rotation: Tensor | None, layout: SegmentLayout) -> tuple[Tensor, ...]:
        x = self.embedding_norm(x)
        tapped = []
        for index, layer in enumerate(self.layers):
            if self.recomputes_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, layout, use_reentrant=False)
            else:
                x = layer(x, rotation, layout)
            if index in self.taps:
                tapped.append(x)
        return self.norm(x), *tapped


def _norm(config: VisionConfig) -> nn.Module:
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.width, eps=config.norm_eps)


def _pictures(layout: SegmentLayout, patches: int) -> Tensor:
    """The picture of each patch: int64 [N]."""
    lengths = layout.cumulative.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=patches)


def _sizes(positions: Tensor, layout: SegmentLayout) -> Tensor:
    """Rows and columns of each patch's picture: int64 [N, 2]."""
    picture = _pictures(layout, len(positions))
    last = positions.new_zeros(len(layout.cumulative) - 1, 2)
    last = last.scatter_reduce(0, picture.unsqueeze(-1).expand(-1, 2), positions, "amax")
    return last[picture] + 1


def _places_after(layout: SegmentLayout, prefix: int, patches: int) -> tuple[Tensor, Tensor, SegmentLayout]:
    """With `prefix` more rows before each picture: the rows of the patches, int64 [N]; the first row of each picture,
    int64; the layout."""
    count = torch.arange(len(layout.cumulative), device=layout.cumulative.device)
    cumulative = layout.cumulative + count * prefix
    own = torch.arange(patches, device=count.device) + (_pictures(layout, patches) + 1) * prefix
    return own, cumulative[:-1], SegmentLayout(cumulative.int(), layout.longest + prefix)


class _Projection(nn.Module):
    """Maps each cell of merge x merge patches to one vector of the decoder's width. `norm`: as `connector_norm`."""

    def __init__(self, config: VisionConfig, width: int, norm: str) -> None:
        super().__init__()
        self.cell_size = config.merge**2
        joined, hidden = config.width * self.cell_size, config.connector_width or width
        eps = config.connector_norm_eps
        self.patch_norm = nn.LayerNorm(config.width, eps) if norm == "patch" else nn.Identity()
        self.cell_norm = nn.LayerNorm(joined, eps) if norm == "joined" else nn.Identity()
        self.up = nn.Linear(joined, hidden)
        self.down = nn.Linear(hidden, width)

    def project(self, features: Tensor) -> Tensor:
        """features [N, Dv] -> [Q, D]."""
        cells = self.cell_norm(self.patch_norm(features).view(-1, self.cell_size * features.shape[-1]))
        return self.down(F.gelu(self.up(cells)))


class TapConnector(_Projection):
    """Of an earlier layer of the encoder, for an early layer of the decoder (DeepStack, Meng et al. 2024)."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__(config, width, "joined")

    def forward(self, features: Tensor) -> Tensor:
        """features [N, Dv] -> [Q, D]."""
        return self.project(features)


class Connector(_Projection):
    """Projects the cells, and adds their place and time. Features of taps have connectors of their own.

    Rotary embeddings encode only distances in the encoder and the order of cells in the decoder, not a cell's place.
    """

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__(config, width, config.connector_norm)
        self.merge = config.merge
        self.place = nn.Linear(2 * 2 * _PLACE_PERIODS, width, bias=False) if config.place_and_time else None
        self.time = nn.Linear(2 * _TIME_PERIODS, width, bias=False) if config.place_and_time else None
        self.taps = nn.ModuleList(TapConnector(config, width) for _ in config.taps)

    def forward(self, features: tuple[Tensor, ...], positions: Tensor, cell_time: Tensor) -> tuple[Tensor, ...]:
        """features [N, Dv] and those of the taps, positions int64 [N, 2], cell_time float32 [Q] seconds (-1: a still
        image) -> [Q, D] for each of the features."""
        last, *tapped = features
        deep = [connector(part) for connector, part in zip(self.taps, tapped, strict=True)]
        return self._placed(self.project(last), positions, cell_time), *deep

    def _placed(self, embedded: Tensor, positions: Tensor, cell_time: Tensor) -> Tensor:
        if self.place is None or self.time is None:
            return embedded
        places = positions.view(-1, self.cell_size, 2)[:, 0] // self.merge  # row and column of the cell
        place = _sinusoids(places.float(), _PLACE_PERIODS, *_CELLS).flatten(1)
        time = _sinusoids(cell_time, _TIME_PERIODS, *_SECONDS) * (cell_time >= 0).unsqueeze(-1)
        return embedded + self.place(place.type_as(embedded)) + self.time(time.type_as(embedded))


def _sinusoids(values: Tensor, count: int, shortest: float, longest: float) -> Tensor:
    """Sines and cosines of `count` geometrically spaced periods. float32 [...] -> [..., 2 * count]."""
    exponent = torch.linspace(0, 1, count, device=values.device)
    angles = 2 * math.pi * values.unsqueeze(-1) / (shortest * (longest / shortest) ** exponent)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
