"""Parameter counts of a recipe's model, by part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsmoe_vl.config.parts import is_adapter
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.planner.parameters import tensors


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of each part, adapters with what they adapt. The output projection is the token embedding and counts
    once."""

    vision: int
    connector: int
    speech: int  # the speech encoder with its connector
    embedding: int
    attention: int  # of the decoder, QK-norms included
    dense_ffn: int  # the dense decoder layers' feed-forwards
    routers: int
    experts: int  # all routed experts
    shared_experts: int
    residual_experts: int  # PR-MoE: one more expert and its mixing weights per layer
    norms: int  # of the decoder
    heads: int  # of the tasks
    active_experts: int  # the part of `experts` that one token uses: K of E

    @property
    def total(self) -> int:
        """Every parameter."""
        return (
            self.vision
            + self.connector
            + self.speech
            + self.embedding
            + self.attention
            + self.dense_ffn
            + self.routers
            + self.experts
            + self.shared_experts
            + self.residual_experts
            + self.norms
            + self.heads
        )

    @property
    def active(self) -> int:
        """Parameters used by one token: K instead of E experts per layer."""
        return self.total - self.experts + self.active_experts


def count_parameters(recipe: Recipe) -> ParameterCounts:
    """The parameters of the model that `recipe` describes."""
    counts = dict.fromkeys(ParameterCounts.__dataclass_fields__, 0)
    for name, shape in tensors(recipe).items():
        counts[_field(name)] += math.prod(shape)
        if _field(name) == "experts":
            counts["active_experts"] += recipe.moe.top_k * math.prod(shape[1:])
    return ParameterCounts(**counts)


def _field(name: str) -> str:
    """The field of ParameterCounts for a tensor."""
    first, _, rest = name.partition(".")
    if first in ("vision", "connector", "speech", "embedding"):
        return first
    if first != "layers":
        return {"head": "embedding", "norm": "norms"}.get(first, "heads")
    kinds = {
        "_norm.weight": "norms", "feed_forward.router.": "routers", "feed_forward.experts.": "experts",
        "feed_forward.shared.": "shared_experts", "feed_forward.mlp.": "residual_experts",
        "feed_forward.coefficient.": "residual_experts", "feed_forward.": "dense_ffn",
    }  # fmt: skip
    if ".attention." in name:
        return "attention"
    return next(kind for part, kind in kinds.items() if part in rest)


def count_adapters(recipe: Recipe) -> int:
    """The parameters of all adapters."""
    return sum(math.prod(shape) for name, shape in tensors(recipe).items() if is_adapter(name))
