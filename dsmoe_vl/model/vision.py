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

_TIME_FEATURES = 32
_LONGEST_PERIOD_SECONDS = 1024.0
_SHORTEST_PERIOD_SECONDS = 0.5


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
    """Turns each cell of merge x merge patches into one vector of the decoder's width, and adds its time."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        self.cell_size = config.merge**2
        self.up = nn.Linear(config.width * self.cell_size, width)
        self.down = nn.Linear(width, width)
        self.time = nn.Linear(_TIME_FEATURES, width, bias=False)

    def forward(self, features: Tensor, cell_time: Tensor) -> Tensor:
        """features [N, Dv], cell_time float32 [Q] seconds (-1: a still image) -> [Q, D]."""
        cells = features.view(-1, self.cell_size * features.shape[-1])
        return self.down(F.gelu(self.up(cells))) + self.time(_time_features(cell_time).type_as(features))


def _time_features(seconds: Tensor) -> Tensor:
    """Sines and cosines of geometrically spaced periods; zeros for a still image. float32 [Q] -> [Q, 32]."""
    half = _TIME_FEATURES // 2
    exponent = torch.linspace(0, 1, half, device=seconds.device)
    periods = _SHORTEST_PERIOD_SECONDS * (_LONGEST_PERIOD_SECONDS / _SHORTEST_PERIOD_SECONDS) ** exponent
    angles = 2 * math.pi * seconds.unsqueeze(-1) / periods
    features = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return features * (seconds >= 0).unsqueeze(-1)
