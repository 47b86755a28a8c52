"""Floating-point operations of the model, with K of E experts per token.

A matrix product costs 2 per parameter and row. Attention costs 4 D per visible position: 2 D for the scores, 2 D for
their product with the values. Norms, softmax, rotations, gathers and the router's biases are not counted. Training
costs three forwards: the backward pass needs one for input gradients and one for weight gradients (Kaplan et al. 2020,
section 2.1). Frozen weights need no gradient of their own, and a vision encoder that is frozen as a whole no backward
pass; elsewhere the gradient still passes through to what trains below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsmoe_vl.config.parts import is_adapter, is_matrix, part_of
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.planner.parameters import PLACE_AND_TIME_FEATURES, experts_of_layers, sparse_layers, tensors
from dsmoe_vl.planner.trained import rules


@dataclass(frozen=True)
class Flops:
    """Forward cost per unit of input, at the given attention contexts."""

    per_token: float  # one token through the decoder layers
    per_label: float  # one position through the output projection, computed at labels only
    per_patch: float  # one patch through the encoder, with its share of the connector
    token_context: float  # positions that an average token attends to
    patch_context: float  # patches that an average patch attends to
    spared_token: float = 0.0  # of the backward pass, because weights are frozen; likewise below
    spared_label: float = 0.0
    spared_patch: float = 0.0

    def training(self, tokens: float, patches: float, labels: float) -> float:
        """Cost of the forward and backward pass for these numbers of tokens, patches and labels."""
        forward = tokens * self.per_token + patches * self.per_patch + labels * self.per_label
        spared = tokens * self.spared_token + patches * self.spared_patch + labels * self.spared_label
        return 3 * forward - spared


def estimate_flops(recipe: Recipe, token_context: float | None = None, patch_context: float | None = None) -> Flops:
    """Costs for given average contexts.

    By default a picture has `image_max_patches` patches, and a segment has as many tokens as that picture. A patch sees
    its whole picture; a token sees half of its segment on average (causal).
    """
    data, merge = recipe.data, recipe.model.vision.merge
    if patch_context is None:
        patch_context = float(data.image_max_patches)
    if token_context is None:
        token_context = min(data.image_max_patches / merge**2, data.pack_length) / 2
    spared_token, spared_label, spared_patch = _spared(recipe, patch_context)
    return Flops(
        spared_token=spared_token,
        spared_label=spared_label,
        spared_patch=spared_patch,
        per_token=_per_token(recipe, token_context),
        per_label=2.0 * recipe.model.width * recipe.tokenizer.vocab_size,
        per_patch=_per_patch(recipe, patch_context),
        token_context=token_context,
        patch_context=patch_context,
    )


def labels_of_full_pack(recipe: Recipe) -> int:
    """Positions without a vision token, in a pack with the maximum number of patches."""
    return max(recipe.data.pack_length - recipe.data.pack_patches // recipe.model.vision.merge**2, 0)


def full_step_flops(recipe: Recipe, flops: Flops, packs: int) -> float:
    """Training cost of `packs` full packs: L tokens, P patches, a label at every position without a vision token."""
    data = recipe.data
    return flops.training(packs * data.pack_length, packs * data.pack_patches, packs * labels_of_full_pack(recipe))


def _per_token(recipe: Recipe, context: float) -> float:
    model, moe = recipe.model, recipe.moe
    width = model.width
    attention = 2 * width * (model.heads + model.kv_heads) * model.width_of_head
    dense = 3 * width * model.ffn_width
    sparse = 3 * width * (moe.top_k * moe.ffn_width + moe.shared_ffn_width) + width * moe.shared_gate
    if moe.residual:
        sparse += 3 * width * moe.ffn_width + 2 * width
    routers = width * sum(experts_of_layers(recipe))
    products = model.layers * attention + moe.first_dense_layers * dense + sparse_layers(recipe) * sparse + routers
    adapters = _adapter_products(recipe, "layers.")
    return 2 * (products + adapters) + model.layers * 4 * model.heads * model.width_of_head * context


def _spared(recipe: Recipe, patch_context: float) -> tuple[float, float, float]:
    """What a token, a label and a patch cost less in the backward pass."""
    model, moe, shapes = recipe.model, recipe.moe, tensors(recipe)
    frozen = {name for name, rule in rules(recipe).items() if rule.freeze}
    products = {name: 2.0 * math.prod(shapes[name]) for name in frozen if is_matrix(name, shapes[name])}
    projection = "embedding.weight" if model.tied else "head.weight"
    token = sum(
        product * _share(name, shapes[name], moe.top_k)
        for name, product in products.items()
        if name.startswith("layers.")
    )
    cell = sum(product for name, product in products.items() if name.startswith("connector."))
    encoder = sum(product for name, product in products.items() if name.startswith("vision.layers."))
    if frozen.issuperset(name for name in shapes if name.startswith("vision.")):
        encoder = 2 * _per_patch_encoder(recipe, patch_context)
    return token, products.get(projection, 0.0), encoder + cell / model.vision.merge**2


def _share(name: str, shape: tuple[int, ...], top_k: int) -> float:
    """The share of a matrix that one token uses: K of its E experts."""
    return top_k / shape[0] if part_of(name) == "experts" else 1.0


def _adapter_products(recipe: Recipe, prefix: str) -> float:
    """Parameters of the adapters that one token uses, or one patch, under a prefix of names."""
    return sum(
        math.prod(shape) * _share(name, shape, recipe.moe.top_k)
        for name, shape in (tensors(recipe).items() if recipe.lora.rank else ())
        if is_adapter(name) and name.startswith(prefix)
    )


def _per_patch(recipe: Recipe, context: float) -> float:
    vision, width = recipe.model.vision, recipe.model.width
    hidden = vision.connector_width or width
    cell = (1 + len(vision.taps)) * (vision.merge**2 * vision.width * hidden + hidden * width)
    cell += PLACE_AND_TIME_FEATURES * width * vision.place_and_time
    return _per_patch_encoder(recipe, context) + 2 * cell / vision.merge**2


def _per_patch_encoder(recipe: Recipe, context: float) -> float:
    vision = recipe.model.vision
    layer = 4 * vision.width**2 + (3 if vision.ffn == "swiglu" else 2) * vision.width * vision.ffn_width
    products = 3 * vision.patch_size**2 * vision.width + vision.layers * layer + _adapter_products(recipe, "vision.")
    return 2 * products + vision.layers * 4 * vision.width * context
