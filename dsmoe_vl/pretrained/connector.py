"""Connectors of other makers: which of their tensors ours are made of. An exported connector has the same names."""

from __future__ import annotations

from collections.abc import Iterator

from dsmoe_vl.config.model import VisionConfig
from dsmoe_vl.pretrained.mapping import Target


def connector_targets(theirs: str, is_normed: bool) -> Iterator[Target]:
    """Of LLaVA's and, with a norm of joined cells, LFM2-VL's projector."""
    names = {"connector.up": "linear_1", "connector.down": "linear_2"}
    if is_normed:
        names["connector.cell_norm"] = "layer_norm"
    for ours, name in names.items():
        for kind in ("weight", "bias"):
            yield Target(f"{ours}.{kind}", (f"{theirs}{name}.{kind}",))


def merger_targets(vision: VisionConfig, theirs: str) -> Iterator[Target]:
    """Of Qwen3-VL's connectors: one of the last layer, and one for each tap."""
    places = {"merger": ("connector", "patch_norm")}
    for index in range(len(vision.taps)):
        places[f"deepstack_merger_list.{index}"] = (f"connector.taps.{index}", "cell_norm")
    for name, (ours, norm) in places.items():
        for their_part, part in (("norm", norm), ("linear_fc1", "up"), ("linear_fc2", "down")):
            for kind in ("weight", "bias"):
                yield Target(f"{ours}.{part}.{kind}", (f"{theirs}{name}.{their_part}.{kind}",))
