"""How rotary positions reach beyond the context of a first training."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_vl.config.bounds import bounded


@dataclass(frozen=True)
class RopeScalingConfig:
    """Slower frequencies of the decoder's rotary embedding, see `model/rotary.py`."""

    kind: str = bounded("none", choices=("none", "linear", "llama3", "yarn"))
    factor: float = bounded(1.0, least=1)  # by which frequencies are divided: all of them, or the low ones
    # With "llama3" and "yarn":
    original_length: int = bounded(0, least=0)  # tokens; the context of the first training
    # With "llama3", turns in that context: a pair with fewer is slowed down, one with more than the second is not
    low_frequency_factor: float = bounded(1.0, above=0)
    high_frequency_factor: float = bounded(4.0, above=0)
    # With "yarn", the same: a pair with more turns than the first is not slowed down, one with fewer than the second is
    beta_fast: float = bounded(32.0, above=0)
    beta_slow: float = bounded(1.0, above=0)
    truncate: bool = True  # the pairs where that begins and ends are whole numbers
    attention_factor: float = bounded(0.0, least=0)  # of cosines and sines; 0: 0.1 ln(factor) + 1
