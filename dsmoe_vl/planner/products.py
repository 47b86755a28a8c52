"""The work of one micro-step on one rank: matrix products, and what operators without products read and write.

The counts follow `model/` and `moe/` operator by operator. They are of the forward pass; the backward pass takes two
products for each of its own, and moves twice as much, since it reads what was kept and the gradient and writes one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace

from dsmoe_vl.config.recipe import MoEConfig, Recipe
from dsmoe_vl.planner.flops import Flops
from dsmoe_vl.planner.parameters import PLACE_AND_TIME_FEATURES, experts_of_layers

# Times that an element is read or written. Queries and keys by a rotation, where `cpu_kernels/` does not rotate them
# while it normalises them; a hidden element by a SwiGLU: there, SiLU is never in memory.
_ROTATION, _SWIGLU, _SWIGLU_ON_CPU = 2, 5, 3
_ROUTER_PASSES = 24  # fp32 numbers moved for each of E scores: softmax, choice, statistics, balancing
# Of a pack's patches, those that are used, and their standard deviation over it: the packer of `data/pack.py` on images
# and videos of many sizes, four to one, for the recipes base and large (docs/scaling.md). Tokens are 99 % used.
PATCHES_USED, PATCHES_SPREAD = 0.61, 0.15
# Operators that the host starts in the forward pass, views included, as torch.profiler counts them in `model/`.
_OF_DECODER_LAYER, _OF_SPARSE, _OF_EXPERT_ON_CPU, _OF_VISION_LAYER, _OF_MODEL = 70, 98, 4, 65, 120
_OF_LAYER_ON_CPU = 35  # of either kind


@dataclass(frozen=True)
class Shape:
    """What one rank computes on in one micro-step."""

    tokens: int  # T, padding included
    patches: int
    labels: int
    ep_size: int = 1

    @classmethod
    def full(cls, recipe: Recipe, packs: int, ep_size: int) -> Shape:
        """Packs that are full of tokens and patches, with a label at every position without a vision token."""
        data, merge = recipe.data, recipe.model.vision.merge
        labels = max(data.pack_length - data.pack_patches // merge**2, 0)
        return cls(packs * data.pack_length, packs * data.pack_patches, packs * labels, ep_size)

    @classmethod
    def typical(cls, recipe: Recipe, packs: int, ep_size: int) -> Shape:
        """Packs as they are on average, of which at least a tenth are positions with a label."""
        full, merge = cls.full(recipe, packs, ep_size), recipe.model.vision.merge
        patches = round(full.patches * PATCHES_USED)
        labels = max(full.tokens - patches // merge**2, full.tokens // 10)
        return replace(full, patches=patches, labels=labels)


@dataclass(frozen=True)
class Product:
    """`times` products [rows, inner] x [inner, outer] of one forward pass."""

    part: str  # "vision", "decoder", "experts" or "head"
    rows: float
    inner: int
    outer: int
    times: int

    @property
    def flops(self) -> float:
        """Of all of them."""
        return 2.0 * self.rows * self.inner * self.outer * self.times

    def moved(self, element: int) -> float:
        """Bytes of one of them: both operands and the result, once each."""
        return element * (self.rows * self.inner + self.inner * self.outer + self.rows * self.outer)


def products(recipe: Recipe, shape: Shape) -> list[Product]:
    """Every product of one forward pass of a rank, with an even load of the experts. Adapters are left out."""
    return [product for product in _products(recipe, shape) if product.times and product.rows]


def _products(recipe: Recipe, shape: Shape) -> Iterator[Product]:
    model, vision, moe = recipe.model, recipe.model.vision, recipe.moe
    tokens, patches, cells = shape.tokens, shape.patches, shape.patches / recipe.model.vision.merge**2
    queries, keys = model.heads * model.width_of_head, model.kv_heads * model.width_of_head
    up = 2 if vision.ffn == "swiglu" else 1
    hidden = vision.connector_width or model.width
    yield Product("vision", patches, 3 * vision.patch_size**2, vision.width, 1)
    yield Product("vision", patches, vision.width, 3 * vision.width, vision.layers)
    yield Product("vision", patches, vision.width, vision.width, vision.layers)
    yield Product("vision", patches, vision.width, up * vision.ffn_width, vision.layers)
    yield Product("vision", patches, vision.ffn_width, vision.width, vision.layers)
    yield Product("vision", cells, vision.merge**2 * vision.width, hidden, 1 + len(vision.taps))
    yield Product("vision", cells, hidden, model.width, 1 + len(vision.taps))
    yield Product("vision", cells, PLACE_AND_TIME_FEATURES, model.width, int(vision.place_and_time))
    yield Product("decoder", tokens, model.width, queries + 2 * keys, model.layers)
    yield Product("decoder", tokens, queries, model.width, model.layers)
    yield Product("decoder", tokens, model.width, 2 * model.ffn_width, moe.first_dense_layers)
    yield Product("decoder", tokens, model.ffn_width, model.width, moe.first_dense_layers)
    for experts in experts_of_layers(recipe):
        rows = tokens * moe.top_k * shape.ep_size / experts
        own = experts // shape.ep_size
        yield Product("decoder", tokens, model.width, experts, 1)
        yield Product("experts", rows, model.width, moe.ffn_width, 2 * own)
        yield Product("experts", rows, moe.ffn_width, model.width, own)
        for width in (moe.shared_ffn_width, moe.ffn_width * moe.residual):
            yield Product("decoder", tokens, model.width, 2 * width, int(width > 0))
            yield Product("decoder", tokens, width, model.width, int(width > 0))
    yield Product("head", shape.labels, model.width, recipe.tokenizer.vocab_size, 1)


def attention_flops(recipe: Recipe, shape: Shape, contexts: Flops) -> float:
    """Scores and their products with the values, of one forward pass."""
    model, vision = recipe.model, recipe.model.vision
    token = 4.0 * model.layers * model.heads * model.width_of_head * contexts.token_context
    return shape.tokens * token + shape.patches * 4.0 * vision.layers * vision.width * contexts.patch_context


@dataclass(frozen=True)
class Traffic:
    """Of operators without products, in one forward pass."""

    elements: float  # read or written, in the precision of the activations
    numbers: float  # the same in fp32, whatever the precision
    operators: int  # started, those with products included


def exchanged_rows(moe: MoEConfig, experts: int, ep_size: int) -> float:
    """Rows of a token that a layer with E `experts` sends over ranks, those that stay included.

    Dropless: one for each rank that has one of its K experts, `ep (1 - C(E - E / ep, K) / C(E, K))` on average if all
    choices are equally likely. With capacity: one for each slot.
    """
    if ep_size == 1:
        return 0.0
    if moe.backend == "capacity":
        return moe.top_k * (moe.capacity_factor if moe.drop_tokens else 1.0)
    return ep_size * (1 - math.comb(experts - experts // ep_size, moe.top_k) / math.comb(experts, moe.top_k))


def traffic(
    recipe: Recipe, shape: Shape, cuda: bool, parts: Collection[str] = ("experts", "decoder", "vision", "head")
) -> Traffic:
    """What the norms, rotations, activations, exchanges of rows and sums of one forward pass of some parts move.

    A norm reads and writes its width; an addition reads two and writes one. A sparse layer gathers its T K rows once,
    and sums them once; over ranks its rows are gathered for the exchange too, and summed on both sides. Experts above
    one rank's mean only delay; they move as much.
    """
    model, vision, moe = recipe.model, recipe.model.vision, recipe.moe
    width, inner = model.width, (model.heads + 2 * model.kv_heads) * model.width_of_head
    turns, wide = (_ROTATION, _SWIGLU) if cuda else (0, _SWIGLU_ON_CPU)
    attention = inner * 2 + (inner - model.kv_heads * model.width_of_head) * turns
    attention += 2 * model.heads * model.width_of_head  # the result
    token = model.layers * (attention + 4 * width + 6 * width) + moe.first_dense_layers * wide * model.ffn_width
    sparse = moe.top_k * (3 * width + wide * moe.ffn_width) + width + wide * moe.shared_ffn_width
    sparse += (wide * moe.ffn_width + 4 * width) * moe.residual
    layers = experts_of_layers(recipe)
    exchanged = 4 * width * sum(exchanged_rows(moe, experts, shape.ep_size) for experts in layers)
    patch_inner = 3 * vision.width
    patch = patch_inner * 2 + 2 * vision.width * turns + 2 * patch_inner + 10 * vision.width
    patch += (wide if vision.ffn == "swiglu" else 2) * vision.ffn_width
    of_layer, of_tower_layer, of_experts = _OF_DECODER_LAYER, _OF_VISION_LAYER, len(layers) * _OF_SPARSE
    if not cuda:
        of_layer = of_tower_layer = _OF_LAYER_ON_CPU
        of_experts += sum(layers) // shape.ep_size * _OF_EXPERT_ON_CPU  # a product for each
    of_part = {
        "experts": Traffic(
            shape.tokens * (len(layers) * sparse + exchanged), shape.tokens * sum(layers) * _ROUTER_PASSES, of_experts
        ),
        "decoder": Traffic(shape.tokens * (token + 8 * width), 0, _OF_MODEL + model.layers * of_layer),
        "vision": Traffic(
            shape.patches * vision.layers * patch, 0, vision.layers * of_tower_layer * bool(shape.patches)
        ),
        "head": Traffic(0, 6.0 * shape.labels * recipe.tokenizer.vocab_size, 0),
    }
    found = [of_part[part] for part in parts]
    return Traffic(*(sum(getattr(one, item.name) for one in found) for item in fields(Traffic)))
