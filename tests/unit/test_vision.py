"""What the connector adds to a cell's features: where the cell stands, and when."""

from __future__ import annotations

import torch

from dsmoe_vl.config.model import VisionConfig
from dsmoe_vl.data.pack import grid_positions
from dsmoe_vl.model.vision import Connector

CONFIG = VisionConfig(patch_size=4, merge=2, width=8, layers=1, heads=2, ffn_width=8)
ROWS, COLUMNS = 3, 4  # cells


def vectors(seconds=-1.0):
    """Of a picture whose cells all look the same: [rows, columns, D]."""
    torch.manual_seed(0)
    connector = Connector(CONFIG, 16)
    positions = torch.tensor(grid_positions((ROWS * 2, COLUMNS * 2), CONFIG.merge))
    cells = ROWS * COLUMNS
    (found,) = connector((torch.ones(cells * 4, CONFIG.width),), positions, torch.full((cells,), seconds))
    return found.detach().view(ROWS, COLUMNS, -1)


def test_every_place_is_told_apart():
    distances = torch.cdist(vectors().flatten(0, 1), vectors().flatten(0, 1))
    assert (distances + torch.eye(ROWS * COLUMNS)).min() > 0.1


def test_rows_and_columns_add_up():
    """The place of a cell is that of its row and that of its column, whatever patches it is made of."""
    found = vectors()
    down, right = found[1:] - found[:-1], found[:, 1:] - found[:, :-1]
    torch.testing.assert_close(down, down[:, :1].expand_as(down), atol=1e-5, rtol=0)
    torch.testing.assert_close(right, right[:1].expand_as(right), atol=1e-5, rtol=0)


def test_time_counts_for_videos_only():
    still, first, later = vectors(), vectors(0.0), vectors(1.0)
    assert not torch.allclose(first, later) and not torch.allclose(still, first)
    torch.testing.assert_close(later - first, (later - first)[:1, :1].expand_as(later), atol=1e-5, rtol=0)
