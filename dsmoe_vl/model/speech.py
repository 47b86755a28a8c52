"""The speech encoder and its connector.

Shapes: F log-mel frames of all recordings, M mel bands, Ws encoder width, S = F / FRAMES_OF_STATE states,
Q = S / merge cells (speech tokens), D decoder width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.config.model import SpeechConfig, VisionConfig
from dsmoe_vl.model.attention import SegmentLayout
from dsmoe_vl.model.layers import RMSNorm, rotary_2d
from dsmoe_vl.model.vision import VisionLayer

_ROTARY_BASE = 10_000.0  # a recording has hundreds of states, a picture tens of rows


class SpeechEncoder(nn.Module):
    """Two convolutions of stride 2 over time (as Speech-Transformer, Dong et al. 2018), a bidirectional transformer
    over the states of each recording, and a connector of two layers that makes one decoder token of `merge` states.

    Recordings follow each other without a gap; each ends with at least one state of silence. So a convolution that
    reads across the border reads zeros, as it does at the ends of its input, and what is computed of a recording does
    not depend on its neighbours.
    """

    def __init__(self, config: SpeechConfig, width: int) -> None:
        """`width`: D."""
        super().__init__()
        self.merge, self.head_width = config.merge, config.width // config.heads
        self.conv1 = nn.Conv1d(config.bands, config.width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        layer = VisionConfig(width=config.width, heads=config.heads, ffn_width=config.ffn_width)
        self.layers = nn.ModuleList(VisionLayer(layer) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, layer.norm_eps)
        self.up = nn.Linear(config.merge * config.width, width)
        self.down = nn.Linear(width, width)

    def forward(self, mel: Tensor, layout: SegmentLayout) -> Tensor:
        """mel float32 [F, M], layout of the recordings in states -> [Q, D]."""
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype).t().unsqueeze(0)))
        ends = layout.cumulative[1:].long() * 2 - 1  # of recordings, after the first convolution
        x = x.index_fill(2, ends, 0.0)
        states = F.gelu(self.conv2(x)).squeeze(0).t()
        rotation = rotary_2d(_places(layout, len(states)), self.head_width, _ROTARY_BASE)
        for layer in self.layers:
            states = layer(states, rotation, layout)
        return self.down(F.gelu(self.up(self.norm(states).unflatten(0, (-1, self.merge)).flatten(1))))


def _places(layout: SegmentLayout, states: int) -> Tensor:
    """The place of each state in its recording, twice: all pairs of features rotate with time. int64 [S, 2]."""
    starts = layout.cumulative[:-1].long()
    lengths = layout.cumulative.diff()
    first = torch.repeat_interleave(starts, lengths, output_size=states)
    place = torch.arange(states, device=first.device) - first
    return place.unsqueeze(-1).expand(-1, 2)
