"""Samples of the synthetic world as the stream yields them, media still encoded."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from data_tools.synthetic.films import film
from data_tools.synthetic.scenes import scene
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.sample import Sample


def sample(kind: str, epoch: int = 0, number: int = 0, **changes: Any) -> Sample:
    """The `number`-th "image" or "video" of 48 x 48 pixels, with its fields changed."""
    draw, media_type = (scene, "jpg") if kind == "image" else (film, "mp4")
    media, meta = draw(np.random.default_rng(number), False, 48, 2)
    made = Sample(f"{kind}-{number}", SourceConfig("test"), epoch, media, media_type, meta["captions"][0], meta)
    return dataclasses.replace(made, **changes)
