"""What config.json says of a language model's rotary positions, read and written. transformers 5 has all of it in
`rope_parameters`; version 4 had `rope_theta`, and `rope_scaling` for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsmoe_vl.config.model import ModelConfig
from dsmoe_vl.config.rope import RopeScalingConfig
from dsmoe_vl.errors import ConfigError

_NEAREST = {"dynamic": "yarn", "longrope": "yarn", "su": "yarn", "ntk": "yarn", "proportional": "default"}
_KINDS = ("default", "linear", "llama3", "yarn")


def read_base(config: Mapping[str, Any], place: str) -> float:
    """Where transformers 5 writes it, else where transformers 4 did. Each ignores the other's: two that differ do not
    say which one the model was trained with. Raises ConfigError."""
    new, old = (config.get("rope_parameters") or {}).get("rope_theta"), config.get("rope_theta")
    if None not in (new, old) and new != old:
        raise ConfigError(
            f"{place}: rope_parameters.rope_theta = {new} and rope_theta = {old} contradict each other: remove the one "
            "that the model was not trained with"
        )
    found = old if new is None else new
    if found is None:
        raise ConfigError(
            f"{place}: neither rope_parameters.rope_theta nor rope_theta is there, and a guess would be wrong without "
            "a word: add the model's own"
        )
    return float(found)


def read_sections(config: Mapping[str, Any], place: str) -> tuple[int, ...]:
    """Of interleaved MRoPE; empty without MRoPE. Raises ConfigError for MRoPE of another form."""
    found = _table(config)
    sections = tuple(found.get("mrope_section") or ())
    if sections and not found.get("mrope_interleaved"):
        raise ConfigError(
            f"{place}: mrope_section = {list(sections)} without mrope_interleaved is not read; the nearest that is: "
            "Qwen3-VL, which has both"
        )
    return sections


def read_scaling(config: Mapping[str, Any], place: str) -> RopeScalingConfig:
    """Raises ConfigError for a kind that is not read, and for values that are missing."""
    found = _table(config)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in _KINDS:
        near = f"; the nearest that is: {_NEAREST[kind]}" if kind in _NEAREST else ""
        raise ConfigError(f"{place}: rope scaling of type {kind!r} is not read, but {', '.join(_KINDS)} are{near}")
    if found.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ConfigError(f"{place}: partial_rotary_factor is not read; models that rotate whole heads are")
    if kind == "default":
        return RopeScalingConfig()

    def need(key: str) -> Any:
        if found.get(key) is None:
            raise ConfigError(f"{place}: {key} of the rope scaling {kind!r} is missing: add the model's own")
        return found[key]

    if kind == "linear":
        return RopeScalingConfig(kind, float(need("factor")))
    original = config.get("original_max_position_embeddings") or need("original_max_position_embeddings")
    if kind == "llama3":
        return RopeScalingConfig(
            kind, float(need("factor")), original, low_frequency_factor=float(need("low_freq_factor")),
            high_frequency_factor=float(need("high_freq_factor")),
        )  # fmt: skip
    factor = float(found.get("factor") or config["max_position_embeddings"] / original)
    return RopeScalingConfig(
        kind, factor, original, beta_fast=float(found.get("beta_fast") or 32),
        beta_slow=float(found.get("beta_slow") or 1), truncate=bool(found.get("truncate", True)),
        attention_factor=_attention_factor(found, factor),
    )  # fmt: skip


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """The keys that say a model's positions, for both versions."""
    scaling = model.rope_scaling
    found: dict[str, Any] = {"rope_type": "default" if scaling.kind == "none" else scaling.kind}
    if scaling.kind != "none":
        found["factor"] = scaling.factor
    if scaling.kind in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        found |= {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
    if scaling.kind == "yarn":
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        found |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
    if model.rope_sections:
        found |= {"mrope_section": list(model.rope_sections), "mrope_interleaved": True}
    older = {} if found == {"rope_type": "default"} else {"rope_scaling": found}
    return {"rope_theta": model.rope_base, "rope_parameters": found | {"rope_theta": model.rope_base}, **older}


def _table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found


def _attention_factor(found: Mapping[str, Any], factor: float) -> float:
    """Of yarn, 0 for what follows from the factor. DeepSeek's two numbers are the share of that in the quotient."""
    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])
    shares = [found.get(key) for key in ("mscale", "mscale_all_dim")]
    if not all(shares):
        return 0.0
    over, under = (0.1 * float(share or 0) * math.log(factor) + 1 for share in shares)
    return over / under
