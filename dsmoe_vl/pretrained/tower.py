"""Vision encoders of other makers: what their config.json means, and which of their tensors ours are made of. Those of
SigLIP, SigLIP2 and CLIP are read in both directions, to import and to export.

Read: SigLIP and SigLIP2 (of fixed size and NaFlex), CLIP, DINOv2, InternViT, and Qwen3-VL's for still images. Features
are those that vision-language models take: after the last norm, for CLIP the last layer but one, for InternViT and
Qwen3-VL without a norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.config.model import VisionConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.pretrained.mapping import (
    Make,
    Target,
    folded_pixels,
    fused_qkv,
    in_thirds,
    joined,
    only,
    split_fused_qkv,
)

_HALF = (0.5, 0.5, 0.5)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class _Family:
    """Names of tensors on disk, and what does not follow from config.json. `parts`: of a layer, by ours."""

    layer: str
    parts: Mapping[str, str]
    patches: str
    position: str
    final: str | None
    pixels: tuple[Sequence[float], Sequence[float]]  # mean and standard deviation, where no file says them
    resize: str = "bicubic"
    class_token: str | None = None
    norm_before: str | None = None
    scales: tuple[str, str] | None = None
    skipped_layers: int = 0  # at the end
    flat_patches: bool = False  # the patch embedding is a matrix, by row, column and channel; else a convolution
    norm_eps: float = 0.0  # 0: config.json says it
    rope_base: float = 0.0  # of the rotary embedding, if it has one; queries, keys and values are then one tensor


_SIGLIP_LAYER = {
    "attention_norm": "layer_norm1", "feed_forward_norm": "layer_norm2", "feed_forward.up": "mlp.fc1",
    "feed_forward.down": "mlp.fc2", "attention.out": "self_attn.out_proj", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj", "v": "self_attn.v_proj",
}  # fmt: skip
_SIGLIP = _Family(
    "encoder.layers.{}.", _SIGLIP_LAYER, "embeddings.patch_embedding", "embeddings.position_embedding.weight",
    "post_layernorm", (_HALF, _HALF),
)  # fmt: skip
FAMILIES = {
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": _Family(**{**vars(_SIGLIP), "resize": "bilinear", "flat_patches": True}),
    "clip_vision_model": _Family(
        "encoder.layers.{}.", _SIGLIP_LAYER, "embeddings.patch_embedding", "embeddings.position_embedding.weight", None,
        _CLIP, class_token="embeddings.class_embedding", norm_before="pre_layrnorm", skipped_layers=1,
    ),
    "dinov2": _Family(
        "encoder.layer.{}.",
        {
            "attention_norm": "norm1", "feed_forward_norm": "norm2", "feed_forward.up": "mlp.fc1",
            "feed_forward.down": "mlp.fc2", "attention.out": "attention.output.dense",
            "q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value",
        },
        "embeddings.patch_embeddings.projection", "embeddings.position_embeddings", "layernorm", _IMAGENET,
        class_token="embeddings.cls_token", scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    ),
    "internvl_vision": _Family(
        "encoder.layer.{}.",
        {
            "attention_norm": "layernorm_before", "feed_forward_norm": "layernorm_after", "feed_forward.up": "mlp.fc1",
            "feed_forward.down": "mlp.fc2", "attention.out": "attention.projection_layer", "q": "attention.q_proj",
            "k": "attention.k_proj", "v": "attention.v_proj",
        },
        "embeddings.patch_embeddings.projection", "embeddings.position_embeddings", None, _IMAGENET,
        class_token="embeddings.cls_token", scales=("lambda_1", "lambda_2"),
    ),
    "qwen3_vl_vision": _Family(
        "blocks.{}.",
        {
            "attention_norm": "norm1", "feed_forward_norm": "norm2", "feed_forward.up": "mlp.linear_fc1",
            "feed_forward.down": "mlp.linear_fc2", "attention.out": "attn.proj", "qkv": "attn.qkv",
        },
        "patch_embed.proj", "pos_embed.weight", None, (_HALF, _HALF), resize="align_corners", norm_eps=1e-6,
        rope_base=10000.0,
    ),
}  # fmt: skip
_WITHIN = {"siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model", "clip": "clip_vision_model"}
_PREFIXES = (
    "", "vision_model.", "vision_tower.vision_model.", "vision_tower.", "model.vision_tower.",
    "model.vision_tower.vision_model.", "model.visual.", "visual.",
)  # fmt: skip
# Tensors that no feature depends on.
_LEFT_OUT = re.compile(
    r"text_model\..*|text_projection.*|visual_projection.*|logit_(scale|bias)|.*vision_model\.head\..*|head\..*"
    r"|.*embeddings\.mask_token|.*position_ids|.*post_layernorm\..*|.*(layer|encoder\.layers)\.(?P<layer>\d+)\..*"
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


@dataclass(frozen=True)
class Tower:
    """A vision encoder in a folder: the settings of ours that it needs, and how to find its tensors."""

    vision: VisionConfig
    family: _Family
    prefix: str
    has_qkv_bias: bool
    mean: Sequence[float]
    std: Sequence[float]

    def targets(self) -> Iterator[Target]:
        """The tensors of our encoder."""
        family, theirs = self.family, self.prefix
        kinds = ("weight", "bias") if family.norm_before is None else ("weight",)  # CLIP's has no bias
        patches = tuple(f"{theirs}{family.patches}.{kind}" for kind in kinds)
        how = "rows by channel, row and column; mean and standard deviation of pixels folded in"
        yield Target("vision.patch_embedding.weight", patches, self._patches(0), how, self._their_patches)
        yield Target(
            "vision.patch_embedding.bias", patches, self._patches(1), how, lambda bias: (None, bias)[: len(kinds)]
        )
        position = f"{theirs}{family.position}"
        if family.class_token is None:
            yield Target("vision.position.weight", (position,))
        else:
            how = "without that of the class token"
            yield Target("vision.position.weight", (position,), _of_patches, how, self._with_class)
            sources = (f"{theirs}{family.class_token}", position)
            yield Target("vision.prefix", sources, _class_token, "with its position", self._class)
        for index in range(self.vision.layers):
            yield from self._layer(theirs + family.layer.format(index), f"vision.layers.{index}.")
        norms = {"vision.embedding_norm": family.norm_before, "vision.norm": family.final}
        for ours, name in norms.items():
            for kind in self._norm_parts() if name else ():
                yield Target(f"{ours}.{kind}", (f"{theirs}{name}.{kind}",))

    def config(self) -> dict[str, Any]:
        """The keys of config.json that say these settings, for SigLIP, SigLIP2, CLIP, InternViT and Qwen3-VL;
        `read_tower` reads them back, but takes CLIP's last layer for one that is not used."""
        vision, naflex = self.vision, self.family.flat_patches
        activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == vision.ffn)
        if self.family.class_token is not None and not self.is_clip:
            side = [vision.patch_size * vision.position_grid] * 2
            return {
                "model_type": "internvl_vision", "hidden_size": vision.width, "intermediate_size": vision.ffn_width,
                "num_hidden_layers": vision.layers, "num_attention_heads": vision.heads, "num_channels": 3,
                "patch_size": [vision.patch_size] * 2, "image_size": side, "hidden_act": activation,
                "layer_norm_eps": vision.norm_eps, "norm_type": "layer_norm", "attention_bias": True,
                "use_qk_norm": False, "use_mean_pooling": True, "use_absolute_position_embeddings": True,
            }  # fmt: skip
        if self.family.rope_base:
            return {
                "hidden_size": vision.width, "intermediate_size": vision.ffn_width, "depth": vision.layers,
                "num_heads": vision.heads, "in_channels": 3, "patch_size": vision.patch_size,
                "temporal_patch_size": 2, "spatial_merge_size": vision.merge, "hidden_act": activation,
                "num_position_embeddings": vision.position_grid**2, "deepstack_visual_indexes": list(vision.taps),
            }  # fmt: skip
        size: dict[str, Any] = {"num_patches": vision.position_grid**2}
        if not naflex:
            size = {"image_size": vision.position_grid * vision.patch_size}
        fixed = "clip_vision_model" if self.is_clip else "siglip_vision_model"
        return size | {
            "model_type": "siglip2_vision_model" if naflex else fixed, "hidden_size": vision.width,
            "intermediate_size": vision.ffn_width, "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads, "num_channels": 3, "patch_size": vision.patch_size,
            "hidden_act": activation, "layer_norm_eps": vision.norm_eps, "vision_use_head": False,
        }  # fmt: skip

    @property
    def is_clip(self) -> bool:
        """Whether it has CLIP's form: no bias of patches, but a class token and a norm before the first layer."""
        return self.family.norm_before is not None

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor of the folder has no place in ours, as it should be."""
        found = _LEFT_OUT.fullmatch(name)
        return found is not None and (found["layer"] is None or int(found["layer"]) >= self.vision.layers)

    def _norm_parts(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.vision.norm == "layer" else ("weight",)

    def _layer(self, theirs: str, ours: str) -> Iterator[Target]:
        parts = self.family.parts
        for name in ("attention_norm", "feed_forward_norm"):
            for kind in self._norm_parts():
                yield Target(f"{ours}{name}.{kind}", (f"{theirs}{parts[name]}.{kind}",))
        for name in ("feed_forward.up", "feed_forward.down", "attention.out"):
            for kind in ("weight", "bias"):
                yield Target(f"{ours}{name}.{kind}", (f"{theirs}{parts[name]}.{kind}",))
        yield from self._qkv(theirs, f"{ours}attention.qkv.")
        if self.family.scales is not None:
            for scale, name in zip(("attention_scale", "feed_forward_scale"), self.family.scales, strict=True):
                yield Target(f"{ours}{scale}.weight", (f"{theirs}{name}",))

    def _qkv(self, theirs: str, ours: str) -> Iterator[Target]:
        parts = self.family.parts
        if self.family.rope_base:
            head, how = self.vision.width // self.vision.heads, "rotary pairs of queries and keys side by side"
            for kind in ("weight", "bias"):
                sources = (f"{theirs}{parts['qkv']}.{kind}",)
                yield Target(f"{ours}{kind}", sources, fused_qkv(head), how, split_fused_qkv(head))
            return
        weights = tuple(f"{theirs}{parts[part]}.weight" for part in "qkv")
        yield Target(f"{ours}weight", weights, joined, "queries, keys and values", in_thirds)
        if self.has_qkv_bias:
            biases = tuple(f"{theirs}{parts[part]}.bias" for part in "qkv")
            yield Target(f"{ours}bias", biases, joined, "queries, keys and values", in_thirds)
        else:
            yield Target(f"{ours}bias", weights[:1], _zero_biases, "zeros: there are none")

    def _patches(self, part: int) -> Make:
        def make(found: Sequence[Tensor]) -> Tensor:
            weight, bias = found[0], found[1] if len(found) > 1 else None
            if weight.dim() == 5:  # of two frames: those of a still image are equal
                weight = weight.sum(2)
            if weight.dim() == 2:  # by row, column and channel
                side = self.vision.patch_size
                weight = weight.view(-1, side, side, 3).permute(0, 3, 1, 2)
            return folded_pixels(weight.flatten(1), bias, self.mean, self.std)[part]

        return make

    def _their_patches(self, weight: Tensor) -> Sequence[Tensor | None]:
        """For pixels from -1 to 1, as ours."""
        side = self.vision.patch_size
        kernel = weight.view(-1, 3, side, side)
        if self.family.rope_base:  # of two frames, which are equal
            return (kernel / 2).unsqueeze(2).expand(-1, -1, 2, -1, -1).contiguous(), None
        theirs = kernel.permute(0, 2, 3, 1).flatten(1) if self.family.flat_patches else kernel
        return (theirs,) if self.is_clip else (theirs, None)

    def _with_class(self, table: Tensor) -> tuple[Tensor]:
        """The inverse of `_of_patches`, with a position of zeros for the class token, which has its own in it."""
        whole = torch.cat((table.new_zeros(1, table.shape[1]), table))
        return (whole if self.is_clip else whole[None],)

    def _class(self, own: Tensor) -> tuple[Tensor, None]:
        return (own[0] if self.is_clip else own[None]), None


def siglip_tower(vision: VisionConfig, naflex: bool, prefix: str) -> Tower:
    """The tower that a vision encoder of ours with SigLIP's form is exported as."""
    return own_tower("siglip2_vision_model" if naflex else "siglip_vision_model", vision, prefix)


def own_tower(kind: str, vision: VisionConfig, prefix: str) -> Tower:
    """The tower that a vision encoder of ours is exported as, if it has the form of the family."""
    return Tower(vision, FAMILIES[kind], prefix, True, _HALF, _HALF)


def clip_tower(vision: VisionConfig, prefix: str) -> Tower:
    """As `siglip_tower`, for CLIP's form. The class has a last norm of patches too, which no feature depends on."""
    return Tower(vision, replace(FAMILIES["clip_vision_model"], final="post_layernorm"), prefix, True, _HALF, _HALF)


def _of_patches(found: Sequence[Tensor]) -> Tensor:
    table = only(found)
    return table.reshape(-1, table.shape[-1])[1:]


def _class_token(found: Sequence[Tensor]) -> Tensor:
    token, table = found
    return token.reshape(1, -1) + table.reshape(-1, table.shape[-1])[:1]


def _zero_biases(found: Sequence[Tensor]) -> Tensor:
    return torch.zeros(3 * len(only(found)), dtype=only(found).dtype)


def read_tower(config: Mapping[str, Any], preprocessor: Mapping[str, Any], names: Collection[str], place: str) -> Tower:
    """From a config.json, a preprocessor_config.json (may be empty) and the names of the tensors. `place`: the config's
    file, for messages. Raises ConfigError."""
    if "vision_config" in config:  # of a whole model
        outer = config
        config = {"model_type": _WITHIN.get(outer.get("model_type", ""), ""), **config["vision_config"]}
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{place}: model_type = {kind!r} of a vision encoder is not read, but {', '.join(FAMILIES)} are"
        )
    family = FAMILIES[kind]
    prefix = next((p for p in _PREFIXES if f"{p}{family.position}" in names), None)
    if prefix is None:
        raise ConfigError(f"{place}: no tensor {family.position} of a {kind} is beside it")

    def need(*keys: str) -> Any:
        for key in keys:
            if config.get(key) is not None:
                return config[key]
        raise ConfigError(f"{place}: {' or '.join(keys)} is missing, and a guess would be wrong without a word: add it")

    activation = need("hidden_act")
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"{place}: hidden_act = {activation!r} is not read, but {', '.join(_ACTIVATIONS)} are")
    for key in ("use_qk_norm", "use_swiglu_ffn"):
        if config.get(key):
            raise ConfigError(f"{place}: {key} = true is not read; encoders without are")
    width = need("hidden_size")

    def side(key: str) -> int:  # of a square; InternViT has both sides
        found = need(key)
        return int(found[0] if isinstance(found, list) else found)

    patch, patches = side("patch_size"), config.get("num_patches", config.get("num_position_embeddings"))
    grid = math.isqrt(patches) if patches else side("image_size") // patch
    hidden = config.get("intermediate_size") or width * need("mlp_ratio")
    vision = VisionConfig(
        patch_size=patch, width=width, layers=need("num_hidden_layers", "depth") - family.skipped_layers,
        heads=need("num_attention_heads", "num_heads"), ffn_width=hidden,
        norm="rms" if config.get("norm_type") == "rms_norm" else "layer",
        norm_eps=family.norm_eps or need("layer_norm_eps"), bias=True,
        qk_norm=False, ffn=_ACTIVATIONS[activation], layer_scale=family.scales is not None,
        positions="learned+rotary" if family.rope_base else "learned",
        rope_base=(config.get("rope_parameters") or {}).get("rope_theta", family.rope_base) or VisionConfig.rope_base,
        position_grid=grid, position_resize=family.resize, prefix_tokens=int(family.class_token is not None),
        pre_norm=family.norm_before is not None, final_norm=family.final is not None,
    )  # fmt: skip
    mean, std = family.pixels
    return Tower(
        vision, family, prefix, f"{prefix}{family.layer.format(0)}{family.parts.get('q')}.bias" in names,
        preprocessor.get("image_mean", mean), preprocessor.get("image_std", std),
    )  # fmt: skip
