"""Bytes that one micro-step keeps from its forward pass for its backward pass, and those that come and go.

Counted from what the operators of `model/` and `moe/` save for PyTorch's autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_vl.config.recipe import RECOMPUTED, Recipe
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.products import Shape, exchanged_rows

LOSS_CHUNK = 2048  # targets whose logits `model/vlm.py` has in memory at once
_INDEX = 8  # bytes of an int64
# Of what a layer keeps, gradients that are there at once: in a SwiGLU's backward pass those of the input and two of the
# four tensors of its hidden width, while what was kept goes.
_GRADIENTS = 0.5


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank."""

    kept: float  # by all layers until their backward pass
    recomputed: float  # of one layer, made again in its backward pass; 0 without recomputation
    gradients: float  # of one decoder layer's activations, in its backward pass
    logits: float  # of the chunk of the loss that takes most

    @property
    def total(self) -> float:
        """At the peak: in the backward pass of the loss or of the last layer."""
        return self.kept + max(self.recomputed + self.gradients, self.logits)


def activations(recipe: Recipe, shape: Shape, *, bf16: bool, cuda: bool, recompute: str = "none") -> Activations:
    """What a micro-step keeps. `recompute`, a key of `RECOMPUTED`: of what is computed again, its input alone."""
    element = 2 if bf16 else 4
    model, vision, again = recipe.model, recipe.model.vision, RECOMPUTED[recompute]
    fused = not cuda and not bf16  # as `cpu_kernels/` has it
    layers = _decoder_layers(recipe, shape, element, cuda, fused)
    vision_layer, around = _vision(recipe, element, cuda, fused)
    made_again = [0.0]
    if "decoder" in again:
        kept = 1.0 * shape.tokens * len(layers) * model.width * element
        made_again.append(shape.tokens * max(layer.kept for layer in layers))
    elif "experts" in again:  # their input is what the norm before them keeps
        kept = shape.tokens * sum(layer.kept - layer.experts for layer in layers)
        made_again.append(shape.tokens * max(layer.experts for layer in layers))
    else:
        kept = shape.tokens * sum(layer.kept for layer in layers)
    if "vision" in again:
        kept += shape.patches * vision.layers * vision.width * element
        made_again.append(shape.patches * vision_layer)
    else:
        kept += shape.patches * vision.layers * vision_layer
    kept += shape.patches * around
    # After the layers: the final norm's values, and what leaves it.
    kept += shape.tokens * (2 * model.width * element + 16 * _INDEX) + shape.labels * model.width * element
    # The loss keeps log-probabilities, and its gradient makes two more of their size.
    logits = min(shape.labels, LOSS_CHUNK) * recipe.tokenizer.vocab_size * (12 + (2 if bf16 else 0))
    gradients = shape.tokens * max(layers, key=lambda layer: layer.kept).gradients
    return Activations(kept, max(made_again), gradients, logits)


@dataclass(frozen=True)
class _Layer:
    """Bytes a token that a decoder layer keeps, those of its experts alone, and of its gradients at once."""

    kept: float
    experts: float
    gradients: float


def _decoder_layers(recipe: Recipe, shape: Shape, element: int, cuda: bool, fused: bool) -> list[_Layer]:
    model, moe = recipe.model, recipe.moe
    fused_heads = fused and model.qk_norm != "width"
    has_norm = model.qk_norm != "none"
    attention = _attention(model.heads, model.kv_heads, model.width_of_head, has_norm, element, cuda, fused_heads)
    norms = 4 * model.width * element  # two of them: normalised or what they normalise, and times the weight
    wide = 3 if fused else 4  # gate, up, their product, and the SiLU of gate
    dense = wide * model.ffn_width * element
    first = attention + norms + dense
    found = [_Layer(first, 0.0, first * _GRADIENTS)] * moe.first_dense_layers
    row, row_gradients = (moe.top_k * numbers * element for numbers in _expert_row(recipe, cuda, wide))
    for experts in experts_of_layers(recipe):
        sent = exchanged_rows(moe, experts, shape.ep_size)
        came = sent * model.width * element * (moe.backend == "dropless")
        order = (3 * moe.top_k + 1 + 2 * sent) * _INDEX
        scores = experts * 4 * 4  # probabilities, logits and their logarithms, fp32
        every_token = wide * (moe.shared_ffn_width + moe.ffn_width * moe.residual) * element
        routed = order + scores + every_token + came
        rest = attention + norms + routed
        found.append(_Layer(rest + row, routed + row, (rest - came) * _GRADIENTS + row_gradients + came))
    return found


def _expert_row(recipe: Recipe, cuda: bool, wide: int) -> tuple[float, float]:
    """Numbers that a row of the experts keeps, and numbers of its gradients that are there at once.

    Experts as one function keep the products with w1 and w3. On a CPU their gradients exist in pieces, on CUDA at once.
    The others keep both of D and `wide` of F.
    """
    width, hidden = recipe.model.width, recipe.moe.ffn_width
    if recipe.moe.backend == "capacity" or "experts" in recipe.lora.adapted:
        return 2 * width + wide * hidden, (2 * width + wide * hidden) * _GRADIENTS
    return 2 * hidden, 3 * width + 4 * hidden if cuda else width


def _attention(
    heads: int, kv_heads: int, head_width: int, has_norm: bool, element: int, cuda: bool, fused: bool
) -> float:
    """Bytes a row: what the norms of q and k keep (`fused`: what was not normalised, with the values), then q, k and v,
    turned q and k, and the result with the sum of each row's exponentials."""
    queries, keys = heads * head_width, kv_heads * head_width
    normalised = (queries + (2 if fused else 1) * keys) * element if has_norm else 0
    if cuda:
        return normalised + (3 * queries + 3 * keys) * element + 4 * heads
    return normalised + (2 * queries + 2 * keys) * 4 + 4 * heads  # attention on a CPU is in fp32


def _vision(recipe: Recipe, element: int, cuda: bool, fused: bool) -> tuple[float, float]:
    """Bytes a patch of one layer of the encoder, and of what is around the layers, the connector included."""
    vision = recipe.model.vision
    fused_heads = fused and "rotary" in vision.positions
    head_width = vision.width // vision.heads
    attention = _attention(vision.heads, vision.heads, head_width, vision.qk_norm, element, cuda, fused_heads)
    wide = ((3 if fused else 4) if vision.ffn == "swiglu" else 2) * vision.ffn_width
    layer = attention + (4 * vision.width + wide) * element
    hidden = vision.connector_width or recipe.model.width
    cell = (2 * hidden + 2 * recipe.model.width) * (1 + len(vision.taps)) * element
    return layer, (3 * vision.patch_size**2 + 2 * vision.width) * element + cell / vision.merge**2
