"""Whole vision-language models of other makers: language model, vision encoder and connector in one folder.

Read: InternVL with a text part of `decoder.FAMILIES`, as InternVL3.5 has Qwen3 and Qwen3-MoE; Qwen3-VL and Qwen3-VL-MoE
for still images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.pretrained.connector import connector_targets, merger_targets
from dsmoe_vl.pretrained.decoder import Decoder, read_decoder
from dsmoe_vl.pretrained.mapping import Target
from dsmoe_vl.pretrained.tower import Tower, read_tower

KINDS = ("internvl", "qwen3_vl", "qwen3_vl_moe")
# What else is called a vision-language model, and where its weights are in a form that is read.
_NEAREST = {
    "internvl_chat": 'internvl, the form of the folders whose names end with "-HF"',
    "qwen2_vl": "qwen3_vl",
    "qwen2_5_vl": "qwen3_vl",
    "lfm2_vl": "its parts: --text of a language model and --vision of a SigLIP2",
    "llava": "its parts: --text of the language model and --vision of the encoder",
}
# The text part under another name; its gates always sum to 1, and its files need not name a balance loss.
_TEXTS_OF: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"model_type": "qwen3"},
    "qwen3_vl_moe": {"model_type": "qwen3_moe", "norm_topk_prob": True},
}
_BALANCE = {"router_aux_loss_coef": 0.001}
_SYMBOLS = ("image", "video", "vision_start", "vision_end")  # whose ids are in config.json, as image_token_id
_TEXTS = ("model.language_model.", "language_model.model.")  # prefixes of different versions
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_PROJECTORS = ("multi_modal_projector.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class Whole:
    """A model in a folder. The tower's settings include those of the connector. `symbols`: the ids of the pieces that
    stand for pictures, by the symbols' names in the recipe. `pieces`: ids below are those of text."""

    decoder: Decoder
    tower: Tower
    connector: tuple[Target, ...]
    symbols: Mapping[str, int]
    pieces: int

    def pictures(self) -> Iterator[Target]:
        """The tensors of vision encoder and connector."""
        yield from self.tower.targets()
        yield from self.connector

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor of the folder has no place in ours, as it should be."""
        return name.startswith(self.tower.prefix) and self.tower.leaves_out(name)


def is_whole(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a whole model that is read."""
    return config.get("model_type") in KINDS


def read_whole(config: Mapping[str, Any], preprocessor: Mapping[str, Any], names: Collection[str], place: str) -> Whole:
    """From a config.json, a preprocessor_config.json (may be empty) and the names of the tensors. `place`: the config's
    file, for messages. Raises ConfigError."""
    kind = config.get("model_type")
    if kind not in KINDS:
        near = _NEAREST.get(str(kind))
        hint = f"; the nearest that is: {near}" if near else ""
        raise ConfigError(
            f"{place}: model_type = {kind!r} of a whole model is not read, but {', '.join(KINDS)} are{hint}"
        )
    decoder = _decoder(config, names, place)
    if kind == "internvl":
        tower = read_tower(config, preprocessor, names, place)
        tower, connector = _internvl(config, tower, names, place)
    else:
        decoder = replace(decoder, has_stacks=f"{decoder.prefix}layers.0.mlp.experts.gate_up_proj" in names)
        seen = {**config["vision_config"], "model_type": "qwen3_vl_vision"}
        tower = _qwen(seen, read_tower(seen, preprocessor, names, f"{place}, vision_config"), place)
        connector = tuple(merger_targets(tower.vision, tower.prefix))
        _refuse_square_experts(decoder, place)
    ids = {name: config[key] for name in _SYMBOLS if isinstance(config.get(key := f"{name}_token_id"), int)}
    symbols = {name: row for name, row in ids.items() if name in ("image", "video")}
    return Whole(decoder, tower, connector, symbols, min(ids.values(), default=decoder.vocab_size))


def _decoder(config: Mapping[str, Any], names: Collection[str], place: str) -> Decoder:
    for key in ("text_config", "vision_config"):
        if not isinstance(config.get(key), Mapping):
            raise ConfigError(f"{place}: {key} is missing: download the folder again")
    text = config["text_config"]
    if config["model_type"] in _TEXTS_OF:
        text = {**_BALANCE, **text, **_TEXTS_OF[config["model_type"]]}
    head = next((name for name in _HEADS if name in names), None)
    decoder = read_decoder(text, () if head is None else ("lm_head.weight",), f"{place}, text_config")
    prefix = _first_of(_TEXTS, "embed_tokens.weight", names, place)
    return replace(decoder, prefix=prefix, head=head or _HEADS[0])


def _first_of(prefixes: Sequence[str], tensor: str, names: Collection[str], place: str) -> str:
    for prefix in prefixes:
        if prefix + tensor in names:
            return prefix
    raise ConfigError(f"{place}: no tensor {prefixes[0]}{tensor} is beside it")


def _internvl(
    config: Mapping[str, Any], tower: Tower, names: Collection[str], place: str
) -> tuple[Tower, tuple[Target, ...]]:
    """With InternVL's connector: cells of a square, their norm, two matrices."""
    ratio = config.get("downsample_ratio", 0.5)
    merge = round(1 / ratio)
    same = {"projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    wrong = [key for key, value in same.items() if config.get(key, value) != value]
    if merge * ratio != 1:
        wrong.append("downsample_ratio")
    if wrong:
        key = wrong[0]
        usual = repr(same[key]) if key in same else "1/n"
        raise ConfigError(f"{place}: {key} = {config[key]!r} of a connector is not read; {usual} is")
    vision = replace(
        tower.vision, merge=merge, connector_norm="joined", connector_norm_eps=1e-5, place_and_time=False,
        placeholder="replace",
    )  # fmt: skip
    prefix = _first_of(_PROJECTORS, "linear_1.weight", names, place)
    return replace(tower, vision=vision), tuple(connector_targets(prefix, is_normed=True))


def _qwen(vision: Mapping[str, Any], tower: Tower, place: str) -> Tower:
    """With Qwen3-VL's connectors: one of the last layer, whose patches are normalised, and one for each tap."""
    taps = tuple(vision.get("deepstack_visual_indexes") or ())
    if list(taps) != sorted(set(taps)):
        raise ConfigError(f"{place}: deepstack_visual_indexes = {list(taps)} are not in order; only those are read")
    merge = vision.get("spatial_merge_size", 2)
    changed = replace(
        tower.vision, merge=merge, connector_norm="patch", connector_norm_eps=1e-6,
        connector_width=merge**2 * tower.vision.width, taps=taps, place_and_time=False, placeholder="replace",
    )  # fmt: skip
    return replace(tower, vision=changed)


def _refuse_square_experts(decoder: Decoder, place: str) -> None:
    """Versions of transformers write stacks of experts one way or transposed: the sizes must distinguish them."""
    if decoder.has_stacks and decoder.moe is not None:
        width, hidden = decoder.model.width, decoder.moe.ffn_width
        if width in (hidden, 2 * hidden):
            raise ConfigError(
                f"{place}: hidden_size = {width} and moe_intermediate_size = {hidden} do not show which way stacked "
                "experts are written: store one tensor an expert"
            )
