"""Segments of equal length with one square picture each."""

from __future__ import annotations

import numpy as np

from dsmoe_vl.config.model import VisionConfig
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Segment

PICTURES = 8  # of a pack
_SIDE, _TEXT = 4, 10  # cells of a picture's side, tokens of a text


def picture_segment(vision: VisionConfig) -> Segment:
    """A picture of 4 x 4 cells and ten tokens of text, of which all but the picture's have labels."""
    rng, side, cells = np.random.default_rng(0), _SIDE * vision.merge, _SIDE**2
    patches = rng.integers(0, 256, (side**2, 3 * vision.patch_size**2), dtype=np.uint8)
    places = np.arange(cells + _TEXT)
    tokens = rng.integers(10, 100, cells + _TEXT).astype(np.int32)
    labels = np.where(places < cells, IGNORE, tokens).astype(np.int32)
    modality = np.where(places < cells, Modality.IMAGE, Modality.TEXT).astype(np.int32)
    picture = Picture(patches, (side, side), -1.0, np.arange(cells, dtype=np.int32))
    return Segment(task_number("caption"), tokens, labels, modality, [picture])
