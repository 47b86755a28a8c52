"""Names of the experts' tensors: stacked in the one-process model, and of one expert, as they are stored."""

from __future__ import annotations

import re

_STACKED = re.compile(r"(.*\.experts)\.(w[123](?:_lora_[ab])?)")


def is_of_experts(name: str) -> bool:
    """Whether a tensor of the one-process model has weights of a layer's experts, or adapters, stacked: [E, ...]."""
    return _STACKED.fullmatch(name) is not None


def expert_name(stacked: str, number: int) -> str:
    """`layers.1.feed_forward.experts.w1`, 3 -> `layers.1.feed_forward.experts.3.w1`."""
    match = _STACKED.fullmatch(stacked)
    assert match is not None, stacked
    return f"{match[1]}.{number}.{match[2]}"
