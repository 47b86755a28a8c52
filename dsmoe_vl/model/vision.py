"""The vision encoder and the connector.

Shapes: N patches of all pictures, C = 3 * patch_size**2, Dv encoder width, Q = N / merge**2 cells, D decoder width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.config.recipe import VisionConfig
from dsmoe_vl.model.attention import Attention, SegmentLayout
from dsmoe_vl.model.layers import RMSNorm, SwiGLU, rotary_2d

_TIME_PERIODS = 16
_SECONDS = (0.5, 1024.0)  # shortest and longest period
_PLACE_PERIODS = 8  # each for row and column
_CELLS = (2.0, 256.0)


class VisionLayer(nn.Module):
    """Pre-norm attention within a picture, then SwiGLU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads, config.heads, causal=False)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = SwiGLU(config.width, config.ffn_width)

    def forward(self, x: Tensor, rotation: Tensor, layout: SegmentLayout) -> Tensor:
        """x [N, Dv] -> [N, Dv]."""
        x = x + self.attention(self.attention_norm(x), rotation, layout)
        return x + self.feed_forward(self.feed_forward_norm(x))


class VisionEncoder(nn.Module):
    """A transformer over the patches of each picture, at the picture's own resolution and aspect ratio."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.width)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)

    def forward(self, patches: Tensor, positions: Tensor, layout: SegmentLayout) -> Tensor:
        """patches uint8 [N, C], positions int64 [N, 2] -> [N, Dv]."""
        pixels = patches.to(self.norm.weight.dtype).div_(127.5).sub_(1.0)
        x = self.patch_embedding(pixels)
        rotation = rotary_2d(positions, self.head_width)
        for layer in self.layers:
            x = layer(x, rotation, layout)
        return self.norm(x)


class Connector(nn.Module):
    """Maps each cell of merge x merge patches to one vector of the decoder's width, and adds its place and time.

    Rotary embeddings encode only distances in the encoder and the order of cells in the decoder, not a cell's place.
    """

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        self.cell_size = config.merge**2
        self.up = nn.Linear(config.width * self.cell_size, width)
        self.down = nn.Linear(width, width)
        self.place = nn.Linear(2 * 2 * _PLACE_PERIODS, width, bias=False)
        self.time = nn.Linear(2 * _TIME_PERIODS, width, bias=False)
        self.merge = config.merge

    def forward(self, features: Tensor, positions: Tensor, cell_time: Tensor) -> Tensor:
        """features [N, Dv], positions int64 [N, 2], cell_time float32 [Q] seconds (-1: a still image) -> [Q, D]."""
        cells = features.view(-1, self.cell_size * features.shape[-1])
        places = positions.view(-1, self.cell_size, 2)[:, 0] // self.merge  # row and column of the cell
        place = _sinusoids(places.float(), _PLACE_PERIODS, *_CELLS).flatten(1)
        time = _sinusoids(cell_time, _TIME_PERIODS, *_SECONDS) * (cell_time >= 0).unsqueeze(-1)
        embedded = self.down(F.gelu(self.up(cells)))
        return embedded + self.place(place.type_as(features)) + self.time(time.type_as(features))


def _sinusoids(values: Tensor, count: int, shortest: float, longest: float) -> Tensor:
    """Sines and cosines of `count` geometrically spaced periods. float32 [...] -> [..., 2 * count]."""
    exponent = torch.linspace(0, 1, count, device=values.device)
    angles = 2 * math.pi * values.unsqueeze(-1) / (shortest * (longest / shortest) ** exponent)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
