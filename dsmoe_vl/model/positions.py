"""Learned positions of patches: a square table, resized to the grid of each picture.

Every resize is separable, so a patch's position is a weighted sum of the table's rows and columns, without a loop over
pictures. Shapes: N patches of all pictures, g side of the table, Dv width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_KEYS = -0.75  # of the cubic kernel (Keys 1981, eq. 4), as in F.interpolate


class LearnedPositions(nn.Module):
    """A table of g x g positions. `resize`:

    - "bilinear": as `F.interpolate(mode="bilinear", align_corners=False, antialias=True)`; SigLIP2.
    - "bicubic": as `F.interpolate(mode="bicubic", align_corners=False)`; SigLIP, CLIP, DINOv2, InternViT.
    - "align_corners": linear, the corners of table and grid coincide; Qwen3-VL.
    """

    def __init__(self, side: int, width: int, resize: str) -> None:
        super().__init__()
        self.side, self.resize = side, resize
        self.weight = nn.Parameter(torch.empty(side * side, width))

    def forward(self, positions: Tensor, sizes: Tensor) -> Tensor:
        """positions and sizes int64 [N, 2]: row and column of a patch, rows and columns of its picture -> [N, Dv]."""
        rows, columns = (resize_weights(positions[:, i], sizes[:, i], self.side, self.resize) for i in (0, 1))
        both = (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(
            1
        )  # one product: three operands need far more memory
        return (both @ self.weight.float()).type_as(self.weight)


def resize_weights(places: Tensor, sizes: Tensor, side: int, resize: str) -> Tensor:
    """The weights of the table's entries for one output entry each, along one axis.

    places int64 [N], of sizes int64 [N] -> float32 [N, g].
    """
    at, size = places.float(), sizes.float()
    source = torch.arange(side, dtype=torch.float32, device=places.device)
    if resize == "align_corners":
        centre = at * (side - 1) / (size - 1).clamp(min=1)
        return (1 - (source - centre.unsqueeze(-1)).abs()).clamp(min=0)
    scale = side / size
    centre = (at + 0.5) * scale - 0.5
    if resize == "bilinear":
        weights = 1 - (source - centre.unsqueeze(-1)).abs() / scale.clamp(min=1).unsqueeze(-1)
        weights = weights.clamp(min=0)
        return weights / weights.sum(-1, keepdim=True)
    assert resize == "bicubic", resize
    weights = centre.new_zeros(len(centre), side)
    for offset in range(-1, 3):
        entry = centre.floor() + offset
        x = (centre - entry).abs()
        near = ((_KEYS + 2) * x - (_KEYS + 3)) * x * x + 1
        far = ((_KEYS * x - 5 * _KEYS) * x + 8 * _KEYS) * x - 4 * _KEYS
        index = entry.clamp(0, side - 1).long()  # beyond the edge, the edge counts again
        weights.scatter_add_(1, index.unsqueeze(-1), torch.where(x <= 1, near, far).unsqueeze(-1))
    return weights
