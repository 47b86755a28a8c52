"""The parts of the model that a recipe's [train] table names, and the part of each parameter.

A parameter's name is that of its tensor in the one-process model, such as `layers.1.feed_forward.experts.w1`; the names
that the engine gives it are known here too.
"""

from __future__ import annotations

import re
from collections.abc import Collection

PARTS = ("vision", "connector", "speech", "embedding", "attention", "feed_forward", "experts", "router", "heads")
LORA_PARTS = ("vision", "attention", "feed_forward", "experts")  # that can have adapters
# The matrices that adapters stand next to. Queries, keys and values are one matrix, and so are gate and up.
_ADAPTED = re.compile(
    r"(vision\.)?layers\.\d+\.(attention\.(qkv|out)|feed_forward\.(shared\.)?(gate_up|up|down))\.weight"
    r"|layers\.\d+\.feed_forward\.(experts|mlp)\.w[123]"
)


def part_of(name: str) -> str:
    """The entry of PARTS for a parameter. Norms belong to the layer after them; "experts" are the routed ones: shared
    and dense feed-forwards are "feed_forward"; "heads" are the tasks', the last norm and an output projection of its
    own. An adapter belongs to the part that it adapts."""
    if ".experts." in name or ".deepspeed_experts." in name:
        return "experts"
    if ".router." in name:
        return "router"
    for part in ("vision", "connector", "speech"):
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


def is_adapted(name: str, parts: Collection[str]) -> bool:
    """Whether a parameter of the one-process model has adapters, if these parts have some (`lora.parts`)."""
    return part_of(name) in parts and _ADAPTED.fullmatch(name) is not None


def adapters_of(name: str) -> tuple[str, str]:
    """The names of A and B of a matrix: `layers.0.attention.qkv.weight` -> `layers.0.attention.qkv.lora_a`, `..._b`;
    `layers.1.feed_forward.experts.w1` -> `layers.1.feed_forward.experts.w1_lora_a`, `..._b`."""
    module, _, tensor = name.rpartition(".")
    stem = f"{module}.lora" if tensor == "weight" else f"{name}_lora"
    return f"{stem}_a", f"{stem}_b"


def is_adapter(name: str) -> bool:
    """Whether a parameter is an A or a B."""
    return name.endswith(("lora_a", "lora_b"))
