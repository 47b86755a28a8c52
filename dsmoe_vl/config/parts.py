"""The parts of the model that a recipe's [train] table names, and the part of each parameter.

A parameter's name is that of its tensor in the one-process model, such as `layers.1.feed_forward.experts.w1`; the names
that the engine gives it are known here too.
"""

from __future__ import annotations

PARTS = ("vision", "connector", "embedding", "attention", "feed_forward", "experts", "router", "heads")


def part_of(name: str) -> str:
    """The entry of PARTS for a parameter. Norms belong to the layer after them; "experts" are the routed ones: shared
    and dense feed-forwards are "feed_forward"; "heads" are the tasks', the last norm and an output projection of its
    own."""
    if ".experts." in name or ".deepspeed_experts." in name:
        return "experts"
    if ".router." in name:
        return "router"
    for part in ("vision", "connector"):
        if f"{part}." in name:
            return part
    if ".attention" in name:
        return "attention"
    if ".feed_forward" in name:
        return "feed_forward"
    return "embedding" if "embedding." in name else "heads"


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is decayed: norms, biases and the router's biases by task and modality are not."""
    return len(shape) >= 2 and not name.endswith("_bias")
