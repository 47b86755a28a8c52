"""Every parameter of a recipe's model, without building it.

Symbols: D decoder width, H heads, G key/value heads, d width of a head, E experts, F hidden width of an expert,
r rank of the adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from dsmoe_vl.config.model import ModelConfig, SpeechConfig, VisionConfig
from dsmoe_vl.config.parts import adapters_of, is_adapted
from dsmoe_vl.config.recipe import LoraConfig, Recipe, learned_tasks
from dsmoe_vl.config.task_table import task_rows

PLACE_AND_TIME_FEATURES = 64  # sinusoids of a cell's place and time, inputs of the connector

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


def sparse_layers(recipe: Recipe) -> int:
    """Decoder layers whose feed-forward is MoE."""
    return recipe.model.layers - recipe.moe.first_dense_layers


def experts_of_layers(recipe: Recipe) -> tuple[int, ...]:
    """E of every MoE layer."""
    return recipe.moe.experts_per_layer or (recipe.moe.experts,) * sparse_layers(recipe)


def tensors(recipe: Recipe) -> dict[str, Shape]:
    """The shapes of all parameters by their names in the one-process model, in its order. An output projection that is
    the token embedding counts once; experts of a layer are one tensor [E, ...]."""
    return dict(_with_adapters(_all(recipe), recipe.lora))


def _with_adapters(named: Named, lora: LoraConfig) -> Named:
    """A module's own parameters, then A [..., r, in] and B [..., out, r] of each of its adapted matrices."""
    for _, of_module in groupby(named, lambda item: item[0].rpartition(".")[0]):
        own = list(of_module)
        yield from own
        for name, shape in own:
            if is_adapted(name, lora.adapted):
                first, second = adapters_of(name)
                *stacked, rows, columns = shape
                yield first, (*stacked, lora.rank, columns)
                yield second, (*stacked, rows, lora.rank)


def _all(recipe: Recipe) -> Named:
    model, moe = recipe.model, recipe.moe
    width, vocabulary = model.width, recipe.tokenizer.vocab_size
    yield from _under("vision", _vision(model.vision))
    yield from _under("connector", _connector(model.vision, width))
    if model.hears:
        yield from _under("speech", _speech(model.speech, width))
    yield "embedding.weight", (vocabulary, width)
    experts = experts_of_layers(recipe)
    for index in range(model.layers):
        sparse = index - moe.first_dense_layers
        inner = _swiglu(width, model.ffn_width) if sparse < 0 else _sparse(recipe, experts[sparse])
        yield from _under(f"layers.{index}", _decoder_layer(model, inner))
    yield "norm.weight", (width,)
    if not model.tied:
        yield "head.weight", (vocabulary, width)
    for spec in learned_tasks(recipe):
        yield from spec.head_shapes(getattr(recipe.tasks, spec.name), width).items()


def _under(prefix: str, named: Named) -> Named:
    return ((f"{prefix}.{name}", shape) for name, shape in named)


def _linear(rows: int, columns: int, bias: bool) -> Named:
    yield "weight", (rows, columns)
    if bias:
        yield "bias", (rows,)


def _norm(width: int, bias: bool) -> Named:
    yield "weight", (width,)
    if bias:
        yield "bias", (width,)


def _swiglu(width: int, hidden: int) -> Named:
    yield "gate_up.weight", (2 * hidden, width)
    yield "down.weight", (width, hidden)


def _decoder_layer(model: ModelConfig, feed_forward: Named) -> Named:
    """q and o: D x (H d); k and v: D x (G d); biases of q, k and v; weights of the QK-norm."""
    queries, keys = (heads * model.width_of_head for heads in (model.heads, model.kv_heads))
    norms = {"head": (model.width_of_head,) * 2, "width": (queries, keys), "none": ()}[model.qk_norm]
    yield "attention_norm.weight", (model.width,)
    yield from _under("attention.qkv", _linear(queries + 2 * keys, model.width, model.qkv_bias))
    for name, width in zip(("q_norm", "k_norm"), norms, strict=False):
        yield f"attention.{name}.weight", (width,)
    yield "attention.out.weight", (model.width, queries)
    yield "feed_forward_norm.weight", (model.width,)
    yield from _under("feed_forward", feed_forward)


def _expert(width: int, hidden: int, stacked: Shape = ()) -> Named:
    for name, shape in (("w1", (hidden, width)), ("w2", (width, hidden)), ("w3", (hidden, width))):
        yield name, (*stacked, *shape)


def _sparse(recipe: Recipe, experts: int) -> Named:
    moe, width = recipe.moe, recipe.model.width
    yield "router.weight", (experts, width)
    yield "router.task_bias", (task_rows(recipe.model.hears), experts)
    yield "router.modality_bias", (recipe.model.modalities, experts)
    yield from _under("experts", _expert(width, moe.ffn_width, (experts,)))
    if moe.shared_ffn_width:
        yield from _under("shared", _swiglu(width, moe.shared_ffn_width))
        if moe.shared_gate:
            yield "shared.gate.weight", (1, width)
    if moe.residual:  # PR-MoE: one more expert, and the weights that mix it in
        yield from _under("mlp", _expert(width, moe.ffn_width))
        yield from _under("coefficient", _linear(2, width, bias=True))


def _vision(vision: VisionConfig) -> Named:
    width, bias = vision.width, vision.norm == "layer"
    if vision.prefix_tokens:
        yield "prefix", (vision.prefix_tokens, width)
    yield from _under("patch_embedding", _linear(width, 3 * vision.patch_size**2, bias=True))
    if "learned" in vision.positions:
        yield "position.weight", (vision.position_grid**2, width)
    if vision.pre_norm:
        yield from _under("embedding_norm", _norm(width, bias))
    for index in range(vision.layers):
        yield from _under(f"layers.{index}", _vision_layer(vision))
    if vision.final_norm:
        yield from _under("norm", _norm(width, bias))


def _vision_layer(vision: VisionConfig) -> Named:
    width, bias = vision.width, vision.norm == "layer"
    yield from _under("attention_norm", _norm(width, bias))
    yield from _under("attention.qkv", _linear(3 * width, width, vision.bias))
    if vision.qk_norm:
        yield "attention.q_norm.weight", (width // vision.heads,)
        yield "attention.k_norm.weight", (width // vision.heads,)
    yield from _under("attention.out", _linear(width, width, vision.bias))
    if vision.layer_scale:
        yield "attention_scale.weight", (width,)
    yield from _under("feed_forward_norm", _norm(width, bias))
    if vision.ffn == "swiglu":
        yield from _under("feed_forward", _swiglu(width, vision.ffn_width))
    else:
        yield from _under("feed_forward.up", _linear(vision.ffn_width, width, bias=True))
        yield from _under("feed_forward.down", _linear(width, vision.ffn_width, bias=True))
    if vision.layer_scale:
        yield "feed_forward_scale.weight", (width,)


def _speech(speech: SpeechConfig, width: int) -> Named:
    for name, columns in (("conv1", speech.bands), ("conv2", speech.width)):
        yield f"{name}.weight", (speech.width, columns, 3)
        yield f"{name}.bias", (speech.width,)
    layer = VisionConfig(width=speech.width, heads=speech.heads, ffn_width=speech.ffn_width)
    for index in range(speech.layers):
        yield from _under(f"layers.{index}", _vision_layer(layer))
    yield "norm.weight", (speech.width,)
    yield from _under("up", _linear(width, speech.merge * speech.width, bias=True))
    yield from _under("down", _linear(width, width, bias=True))


def _connector(vision: VisionConfig, width: int) -> Named:
    yield from _projector(vision, width, vision.connector_norm)
    if vision.place_and_time:
        yield "place.weight", (width, PLACE_AND_TIME_FEATURES // 2)
        yield "time.weight", (width, PLACE_AND_TIME_FEATURES // 2)
    for index in range(len(vision.taps)):
        yield from _under(f"taps.{index}", _projector(vision, width, "joined"))


def _projector(vision: VisionConfig, width: int, norm: str) -> Named:
    cell, hidden = vision.merge**2 * vision.width, vision.connector_width or width
    if norm == "patch":
        yield from _under("patch_norm", _norm(vision.width, bias=True))
    elif norm == "joined":
        yield from _under("cell_norm", _norm(cell, bias=True))
    yield from _under("up", _linear(hidden, cell, bias=True))
    yield from _under("down", _linear(width, hidden, bias=True))
