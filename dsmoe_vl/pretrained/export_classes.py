"""Which class of transformers computes what a model of ours computes, and what is changed so that it does.

A class has one form. What ours lacks is filled with zeros that change nothing; what the class lacks is refused, with
the setting and the fix.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from dsmoe_vl.config.model import ModelConfig, MoEConfig, VisionConfig
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.parameters import sparse_layers
from dsmoe_vl.pretrained.connector import connector_targets, merger_targets
from dsmoe_vl.pretrained.decoder import Decoder
from dsmoe_vl.pretrained.mapping import Target
from dsmoe_vl.pretrained.tower import Tower, clip_tower, own_tower, siglip_tower

BIASES = ("task_bias", "modality_bias", "selection_bias")  # of a router
_DROP = "or give --own-code, or --drop-routing-bias, which changes what the model computes"
_PREFIXES = {  # on disk, as every version of transformers reads them: tower, connector, decoder, output projection
    "lfm2_vl": (
        "model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model.", "lm_head.weight",
    ),
    "llava": (
        "vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.",
        "language_model.lm_head.weight",
    ),
    "internvl": (
        "vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight",
    ),
    "qwen3_vl": ("model.visual.", "model.visual.", "model.language_model.", "lm_head.weight"),
}  # fmt: skip
_PREFIXES["qwen3_vl_moe"] = _PREFIXES["qwen3_vl"]
_ARCHITECTURES = {
    "lfm2_vl": "Lfm2VlForConditionalGeneration", "llava": "LlavaForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}  # fmt: skip
QWEN = ("qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True)
class ExportClass:
    """A class of transformers with this model's sizes.

    recipe: the model in the class's form; its shapes are those of all targets. changes: of our values, by the name of a
    target, where the class computes with others.
    """

    kind: str  # the model_type of config.json
    recipe: Recipe
    decoder: Decoder
    tower: Tower | None = None  # None: the decoder alone
    changes: Mapping[str, float] = field(default_factory=dict)  # factors

    @property
    def is_whole(self) -> bool:
        """Whether it sees pictures."""
        return self.tower is not None

    @property
    def replaces_placeholder(self) -> bool:
        """Whether a cell takes the place of the placeholder's row of the embedding; ours is added to it."""
        return self.is_whole

    @property
    def absorbed(self) -> Mapping[str, str]:
        """Targets that take another of our tensors in, [D], on every row: CLIP's patches have no bias of their own."""
        is_clip = self.tower is not None and self.tower.is_clip
        return {"vision.position.weight": "vision.patch_embedding.bias"} if is_clip else {}

    @property
    def features(self) -> str:
        """LLaVA's strategy: with all features of the tower, or by default without that of the class token."""
        return "default" if self.recipe.model.vision.prefix_tokens else "full"

    @property
    def architecture(self) -> str:
        """The name of the class."""
        return self.decoder.family.architecture if self.tower is None else _ARCHITECTURES[self.kind]

    def targets(self) -> Iterator[Target]:
        """All tensors of the folder."""
        yield from self.decoder.targets()
        if self.tower is not None:
            yield from self.tower.targets()
            if self.kind in QWEN:
                yield from merger_targets(self.tower.vision, _PREFIXES[self.kind][1])
                return
            yield from connector_targets(_PREFIXES[self.kind][1], self.kind != "llava")

    def changed(self, name: str, value: Tensor) -> Tensor:
        """The value of a target, as the class needs it."""
        return value * self.changes[name] if name in self.changes else value

    def config(self, positions: int, image_token: int = 0) -> dict[str, Any]:
        """The model's keys of config.json. positions: the longest sequence trained on. image_token: the id of the
        placeholders of a whole model."""
        text = self.decoder.config(positions)
        if self.tower is None:
            return text
        model, vision = self.recipe.model, self.recipe.model.vision
        outer: dict[str, Any] = {
            "architectures": [self.architecture], "model_type": self.kind, "text_config": text,
            "vision_config": self.tower.config(), "tie_word_embeddings": model.tied, "projector_hidden_act": "gelu",
        }  # fmt: skip
        if self.kind in QWEN:
            del outer["projector_hidden_act"]
            outer["text_config"] = text | {"model_type": f"{self.kind}_text"}
            outer["vision_config"] |= {"model_type": self.kind, "out_hidden_size": model.width}
            return outer | {"image_token_id": image_token}
        if self.kind == "internvl":
            return outer | {
                "image_token_id": image_token, "image_seq_length": (vision.position_grid // vision.merge) ** 2,
                "downsample_ratio": 1 / vision.merge, "vision_feature_layer": -1,
                "vision_feature_select_strategy": "default",
            }  # fmt: skip
        if self.kind == "llava":
            return outer | {
                "image_token_index": image_token, "image_seq_length": vision.position_grid**2,
                "vision_feature_layer": -1, "vision_feature_select_strategy": self.features,
                "multimodal_projector_bias": True,
            }  # fmt: skip
        return outer | {
            "image_token_id": image_token, "downsample_factor": vision.merge, "projector_hidden_size": model.width,
            "projector_bias": True, "projector_use_layernorm": True,
        }  # fmt: skip


def export_class(recipe: Recipe, biases: Collection[str], text_only: bool) -> ExportClass:
    """The class for a model. `biases`: those of BIASES that some router has and that are not zero.

    Raises ConfigError if no class computes what the model computes.
    """
    form = None if text_only else _whole_form(recipe.model.vision)
    whole = form and form.partition(" ")[0]
    if whole == "qwen3_vl":
        return _qwen(recipe, _text_kind(recipe, biases))
    if whole is not None and recipe.model.rope_sections:
        raise ConfigError(
            f"model.rope_sections = {list(recipe.model.rope_sections)}: {whole} has none: give --part text for the "
            "decoder alone, whose texts are the same without them"
        )
    kind = _text_kind(recipe, biases)
    recipe, changes = _in_form(recipe, kind)
    if whole == "llava":  # its tower has a last norm, and takes the features before it
        vision = replace(recipe.model.vision, final_norm=True)
        recipe = replace(recipe, model=replace(recipe.model, vision=vision))
    sparse = sparse_layers(recipe) > 0
    moe, dense = (recipe.moe, recipe.moe.first_dense_layers) if sparse else (None, recipe.model.layers)
    decoder = Decoder(recipe.model, moe, recipe.tokenizer.vocab_size, dense, kind)
    if whole is None:
        return ExportClass(kind, recipe, decoder, changes=changes)
    prefixes = _PREFIXES[whole]
    if form == _CLIP_FORM:
        tower = clip_tower(recipe.model.vision, prefixes[0])
    elif whole == "internvl":
        grid, merge = recipe.model.vision.position_grid, recipe.model.vision.merge
        if grid % merge:
            raise ConfigError(
                f"model.vision.position_grid = {grid}: internvl has squares of that side in cells of {merge} x {merge} "
                "patches: train with a multiple, or give --own-code, or --part text for the decoder alone"
            )
        tower = own_tower("internvl_vision", recipe.model.vision, prefixes[0])
    else:
        tower = siglip_tower(recipe.model.vision, whole == "lfm2_vl", prefixes[0])
    return ExportClass(whole, recipe, replace(decoder, prefix=prefixes[2], head=prefixes[3]), tower, changes)


def _qwen(recipe: Recipe, kind: str) -> ExportClass:
    """Qwen3-VL with or without experts. Raises ConfigError for a decoder that it has not."""
    sections, moe = recipe.model.rope_sections, recipe.moe
    form, _ = _in_form(recipe, kind)
    is_sparse, width = kind == "qwen3_moe", recipe.model.width
    unlike = {
        f"model.rope_sections = {list(sections)}: qwen3_vl has three": not sections,
        f"a decoder like {kind}: qwen3_vl has one like qwen3 or qwen3_moe": kind not in ("qwen3", "qwen3_moe"),
        "gates that do not sum to 1: those of qwen3_vl_moe do": is_sparse and not form.moe.renormalise,
        f"moe.ffn_width = {moe.ffn_width}, model.width = {width}: transformers cannot see which way such experts of "
        "qwen3_vl_moe are written": is_sparse and width in (moe.ffn_width, 2 * moe.ffn_width),
    }
    wrong = next((what for what, is_so in unlike.items() if is_so), None)
    if wrong is not None:
        raise ConfigError(f"{wrong}: train otherwise, or give --part text for the decoder alone")
    form = replace(form, model=replace(form.model, rope_sections=sections))
    tower, _, text, head = _PREFIXES["qwen3_vl"]
    dense = moe.first_dense_layers if is_sparse else form.model.layers
    decoder = Decoder(
        form.model, form.moe if is_sparse else None, recipe.tokenizer.vocab_size, dense, kind, text, head, is_sparse
    )
    return ExportClass(QWEN[is_sparse], form, decoder, own_tower("qwen3_vl_vision", form.model.vision, tower))


def _text_kind(recipe: Recipe, biases: Collection[str]) -> str:
    model, moe = recipe.model, recipe.moe
    if sparse_layers(recipe) == 0:
        dense = {("head", False): "qwen3", ("none", True): "qwen2", ("none", False): "llama"}
        if (model.qk_norm, model.qkv_bias) in dense:
            return dense[model.qk_norm, model.qkv_bias]
        raise _attention(model)
    _refuse_sparse(moe, biases)
    renormalised = moe.renormalise and moe.top_k > 1  # with one expert our gate is its probability
    if "selection_bias" in biases:
        wrong = {
            f'model.qk_norm = "{model.qk_norm}"': model.qk_norm != "none",
            "model.qkv_bias = true": model.qkv_bias,
            "moe.shared_gate = true": moe.shared_gate,
            "gates that do not sum to 1": not renormalised,
            f"moe.shared_ffn_width = {moe.shared_ffn_width}": moe.shared_ffn_width % moe.ffn_width > 0,
        }
        if any(wrong.values()):
            raise ConfigError(
                f"the routers' selection_bias is not zero, and ernie4_5_moe, the only class with one, has no "
                f"{_those(wrong)}: train with moe.bias_rate = 0, {_DROP}"
            )
        return "ernie4_5_moe"
    if model.qk_norm == "none":
        simple = renormalised and not (model.qkv_bias or moe.shared_ffn_width or moe.first_dense_layers)
        return "mixtral" if simple else "qwen2_moe"
    if model.qkv_bias:
        raise _attention(model)
    if model.qk_norm == "head" and not moe.shared_ffn_width:
        return "qwen3_moe"
    wrong = {f"moe.shared_ffn_width = {moe.shared_ffn_width}": moe.shared_ffn_width > 0}
    if model.qk_norm == "width":
        wrong[f"moe.first_dense_layers = {moe.first_dense_layers}"] = moe.first_dense_layers > 0
        wrong[f"model.head_width = {model.head_width}"] = model.width_of_head * model.heads != model.width
    if any(wrong.values()):
        raise ConfigError(
            f'no class with model.qk_norm = "{model.qk_norm}" has {_those(wrong)}: train with 0, or with '
            'model.qk_norm = "none" for qwen2_moe'
        )
    return "olmoe"


def _those(wrong: Mapping[str, bool]) -> str:
    return " or ".join(setting for setting, is_wrong in wrong.items() if is_wrong)


def _attention(model: ModelConfig) -> ConfigError:
    return ConfigError(
        f'no class has model.qk_norm = "{model.qk_norm}" with model.qkv_bias = {str(model.qkv_bias).lower()} and these '
        'feed-forwards: train with model.qk_norm = "head" and model.qkv_bias = false'
    )


def _refuse_sparse(moe: MoEConfig, biases: Collection[str]) -> None:
    """Refuse what no class has."""
    if moe.routing in ("task", "isolated"):
        raise ConfigError(
            f'moe.routing = "{moe.routing}": no class routes by task or modality: train with moe.routing = "plain"'
        )
    own = [name for name in BIASES[:2] if name in biases and moe.routing == "token"]
    if own:
        raise ConfigError(
            f"the routers' {' and '.join(own)} are not zero, and no class has a place for them: train with "
            f'moe.routing = "plain", {_DROP}'
        )
    if len(set(moe.experts_per_layer)) > 1:
        raise ConfigError(
            f"moe.experts_per_layer = {list(moe.experts_per_layer)}: every class has equally many experts in all "
            "layers: train with moe.experts alone"
        )
    if moe.residual:
        raise ConfigError("moe.residual = true: no class has a residual expert: train with false")


def _in_form(recipe: Recipe, kind: str) -> tuple[Recipe, dict[str, float]]:
    """The recipe in the class's form, and the factors of values that this needs."""
    model, moe = recipe.model, recipe.moe
    moe = replace(moe, experts=moe.experts_per_layer[0] if moe.experts_per_layer else moe.experts, experts_per_layer=())
    moe = replace(moe, backend="dropless", renormalise=moe.renormalise and moe.top_k > 1)
    model = replace(model, rope_sections=())  # a text without pictures has the same positions without them
    changes: dict[str, float] = {}
    if kind == "qwen2_moe":
        if moe.shared_ffn_width and not moe.shared_gate:  # its gate will be sigmoid(0)
            layers = range(moe.first_dense_layers, model.layers)
            changes = dict.fromkeys((f"layers.{n}.feed_forward.shared.down.weight" for n in layers), 2.0)
        moe = replace(moe, shared_ffn_width=moe.shared_ffn_width or 1, shared_gate=True)
        model = replace(model, qkv_bias=True)
    return replace(recipe, model=model, moe=moe), changes


_ANY = {
    "norm": ("layer",), "bias": (True,), "qk_norm": (False,), "ffn": ("gelu", "gelu_tanh", "quick_gelu"),
    "layer_scale": (False,), "positions": ("learned",), "prefix_tokens": (0,), "pre_norm": (False,),
    "place_and_time": (False,), "connector_width": (0,), "taps": ((),),
}  # fmt: skip
_LLAVA: dict[str, tuple[Any, ...]] = {"merge": (1,), "final_norm": (False,), "connector_norm": ("none",)}
_CLIP_FORM = "llava with CLIP's encoder"
_WHOLE: dict[str, dict[str, tuple[Any, ...]]] = {
    "lfm2_vl": _ANY | {
        "position_resize": ("bilinear",), "final_norm": (True,), "connector_norm": ("joined",),
        "connector_norm_eps": (1e-5,),
    },
    "llava": _ANY | _LLAVA,
    _CLIP_FORM: _ANY | _LLAVA | {"prefix_tokens": (1,), "pre_norm": (True,)},
    "internvl": _ANY | {
        "layer_scale": (True,), "prefix_tokens": (1,), "position_resize": ("bicubic",), "final_norm": (False,),
        "connector_norm": ("joined",), "connector_norm_eps": (1e-5,),
    },
    "qwen3_vl": {key: values for key, values in _ANY.items() if key not in ("taps", "connector_width")} | {
        "norm_eps": (1e-6,), "positions": ("learned+rotary",), "rope_base": (10000.0,),
        "position_resize": ("align_corners",), "final_norm": (False,), "connector_norm": ("patch",),
        "connector_norm_eps": (1e-6,),
    },
}  # fmt: skip


def _whole_form(vision: VisionConfig) -> str:
    """The class of a whole model, and which encoder it has. Raises ConfigError with all settings that the nearest one
    needs."""
    wrong = {
        kind: {key: values[0] for key, values in needs.items() if getattr(vision, key) not in values}
        for kind, needs in _WHOLE.items()
    }
    if vision.connector_width != (joined := vision.merge**2 * vision.width):
        wrong["qwen3_vl"]["connector_width"] = joined
    nearest = min(wrong, key=lambda kind: len(wrong[kind]))
    if not wrong[nearest]:
        return nearest
    settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in wrong[nearest].items())
    raise ConfigError(
        f"no class has this vision encoder and connector; the nearest, {nearest}, needs in [model.vision]: {settings}. "
        "Train with them, or give --own-code, or --part text for the decoder alone"
    )
