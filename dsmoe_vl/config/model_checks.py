"""Constraints between the fields of a recipe that describe the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce

from dsmoe_vl.config.model import SECONDS_OF_STATE
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.config.task_table import TASKS

# Settings that need moe.backend = "capacity"; _DROPPING also need moe.drop_tokens.
_DROPPING = ("moe.capacity_factor", "moe.eval_capacity_factor", "moe.min_capacity", "moe.random_token_selection")
_CAPACITY = ("moe.drop_tokens", *_DROPPING, "moe.noisy_gate", "moe.residual")

Rule = tuple[bool, str, str]  # whether the recipe satisfies it, its key, the fix


def model_rules(recipe: Recipe) -> Iterator[Rule]:
    """All of them."""
    for rules in (_model, _rope_scaling, _speech, _moe, _capacity):
        yield from rules(recipe)


def value_of(recipe: Recipe, key: str) -> object:
    """The value of a key such as "moe.experts"."""
    return reduce(getattr, key.split("."), recipe)


def _model(recipe: Recipe) -> Iterator[Rule]:
    model, vision = recipe.model, recipe.model.vision
    yield (
        model.head_width > 0 or model.width % model.heads == 0,
        "model.width",
        f"must be a multiple of model.heads = {model.heads}, or set model.head_width",
    )
    head = model.width_of_head
    yield (
        head % 2 == 0,
        "model.head_width" if model.head_width else "model.heads",
        f"gives a head width of {head}; rotary embeddings need an even one",
    )
    yield model.heads % model.kv_heads == 0, "model.kv_heads", f"must divide model.heads = {model.heads}"
    yield (
        not (model.embedding_from and model.init_from),
        "model.embedding_from",
        f"the weights of model.init_from = {model.init_from!r} have an embedding already: remove one of the two",
    )
    sections = model.rope_sections
    yield (
        not sections
        or (len(sections) == 3 and min(sections) >= 0 and sum(sections) == head // 2
            and all(3 * (count - 1) + axis < head // 2 for axis, count in enumerate(sections) if axis and count)),
        "model.rope_sections",
        f"must be three numbers, for time, row and column, whose sum is half of the head width, {head // 2}; of every "
        "three pairs at most one turns with the row and one with the column",
    )  # fmt: skip
    taps = vision.taps
    yield (
        taps == tuple(sorted(set(taps))) and all(0 <= layer < vision.layers for layer in taps),
        "model.vision.taps",
        f"must be different layers of the encoder in order, from 0 to {vision.layers - 1}",
    )
    yield (
        len(taps) <= model.layers,
        "model.vision.taps",
        f"has more layers than the decoder: model.layers = {model.layers}",
    )
    step = (4 if "rotary" in vision.positions else 1) * vision.heads
    yield (
        vision.width % step == 0,
        "model.vision.width",
        f"must be a multiple of 4 x model.vision.heads = {step}: the 2D rotary embedding needs it"
        if step > vision.heads
        else f"must be a multiple of model.vision.heads = {step}",
    )
    learned = "learned" in vision.positions
    yield (
        learned == (vision.position_grid > 0),
        "model.vision.position_grid",
        f'must be the side of the learned table with model.vision.positions = "{vision.positions}"'
        if learned
        else f'has no effect with model.vision.positions = "{vision.positions}": leave it at 0',
    )


def _rope_scaling(recipe: Recipe) -> Iterator[Rule]:
    scaling, key = recipe.model.rope_scaling, "model.rope_scaling"
    is_by_turns = scaling.kind in ("llama3", "yarn")
    yield (
        scaling.kind != "none" or scaling.factor == 1,
        f"{key}.factor",
        f'has no effect with {key}.kind = "none": set the kind, or leave it at 1',
    )
    yield (
        not is_by_turns or scaling.original_length > 0,
        f"{key}.original_length",
        f'must be the context of the first training with {key}.kind = "{scaling.kind}"',
    )
    yield (
        scaling.low_frequency_factor < scaling.high_frequency_factor,
        f"{key}.low_frequency_factor",
        f"must be below {key}.high_frequency_factor = {scaling.high_frequency_factor}",
    )
    yield (
        scaling.beta_slow < scaling.beta_fast,
        f"{key}.beta_slow",
        f"must be below {key}.beta_fast = {scaling.beta_fast}",
    )
    yield (
        scaling.kind != "yarn" or recipe.model.rope_base > 1,
        "model.rope_base",
        f'must be above 1 with {key}.kind = "yarn"',
    )


def _speech(recipe: Recipe) -> Iterator[Rule]:
    speech, data, tasks = recipe.model.speech, recipe.data, recipe.tasks
    if not speech.layers:
        for key, is_off in (
            *((f"tasks.{spec.name}.weight", not getattr(tasks, spec.name).weight) for spec in TASKS if spec.hears),
            ("tasks.caption.hears", not tasks.caption.hears),
            ("tasks.retrieval.spoken", not tasks.retrieval.spoken),
        ):
            yield is_off, key, "needs a speech encoder: set model.speech.layers, such as 2, or leave this out"
        return
    step = 4 * speech.heads
    yield speech.width % step == 0, "model.speech.width", f"must be a multiple of 4 x model.speech.heads = {step}"
    yield (
        not recipe.model.init_from,
        "model.speech.layers",
        f"the weights of model.init_from = {recipe.model.init_from!r} have no speech encoder, and one cannot be added "
        "to them yet: set it to 0",
    )
    yield (
        not recipe.model.rope_sections,
        "model.rope_sections",
        "places tokens by time, row and column, which speech tokens do not have: leave it out, or set "
        "model.speech.layers = 0",
    )
    yield (
        data.speech_max_seconds <= data.pack_speech_seconds,
        "data.speech_max_seconds",
        f"must be at most data.pack_speech_seconds = {data.pack_speech_seconds:g}: a recording must fit into one pack",
    )
    tokens = math.ceil(data.speech_max_seconds / (SECONDS_OF_STATE * speech.merge))
    yield (
        tokens < data.pack_length,
        "data.speech_max_seconds",
        f"gives {tokens} tokens a recording, no room for text in data.pack_length = {data.pack_length}",
    )


def _moe(recipe: Recipe) -> Iterator[Rule]:
    layers, moe = recipe.model.layers, recipe.moe
    yield moe.first_dense_layers <= layers, "moe.first_dense_layers", f"must be at most model.layers = {layers}"
    pyramid = moe.experts_per_layer
    if pyramid:
        sparse = layers - moe.first_dense_layers
        yield (
            len(pyramid) == sparse,
            "moe.experts_per_layer",
            f"has {len(pyramid)} numbers; model.layers = {layers} minus moe.first_dense_layers = "
            f"{moe.first_dense_layers} leaves {sparse} layers: give one number per layer",
        )
        yield (
            moe.experts == max(pyramid),
            "moe.experts",
            f"must be the largest of moe.experts_per_layer: set it to {max(pyramid)}",
        )
    yield (
        moe.shared_ffn_width > 0 or not moe.shared_gate,
        "moe.shared_gate",
        "needs a shared expert: set moe.shared_ffn_width",
    )
    yield (
        moe.renormalise or moe.backend == "dropless",
        "moe.renormalise",
        f'must be true with moe.backend = "{moe.backend}", whose gates always sum to 1',
    )
    fewest, modalities = min(pyramid or (moe.experts,)), recipe.model.modalities
    yield fewest >= 1, "moe.experts_per_layer", "every number must be at least 1"
    where = f"at most moe.experts = {moe.experts}"
    if pyramid:
        where = f"at most {fewest}, the smallest of moe.experts_per_layer = {list(pyramid)}"
    yield moe.top_k <= fewest, "moe.top_k", f"must be {where}"
    yield (
        moe.routing != "isolated" or moe.top_k <= fewest // modalities,
        "moe.routing",
        f"gives each of {modalities} modalities {fewest // modalities} of {fewest} experts per layer (moe.experts, "
        f"moe.experts_per_layer), fewer than moe.top_k = {moe.top_k}",
    )


def _capacity(recipe: Recipe) -> Iterator[Rule]:
    moe, defaults = recipe.moe, Recipe()
    for key in _CAPACITY:
        default = value_of(defaults, key)
        yield (
            moe.backend == "capacity" or value_of(recipe, key) == default,
            key,
            f'has no effect with moe.backend = "{moe.backend}": set moe.backend to "capacity", or leave {key} at '
            f"{default!r}",
        )
    for key in _DROPPING:
        default = value_of(defaults, key)
        yield (
            moe.drop_tokens or value_of(recipe, key) == default,
            key,
            f"has no effect with moe.drop_tokens = false: set moe.drop_tokens to true, or leave {key} at {default!r}",
        )
    yield moe.noisy_gate in ("", "RSample", "Jitter"), "moe.noisy_gate", 'must be "", "RSample" or "Jitter"'
    only_one = f"works with moe.top_k = 1 only, not {moe.top_k}"
    yield moe.top_k == 1 or not moe.random_token_selection, "moe.random_token_selection", f"{only_one}: set it to false"
    yield moe.top_k == 1 or moe.noisy_gate != "RSample", "moe.noisy_gate", f'{only_one}: set it to "Jitter" or ""'
    noisy = moe.random_token_selection or moe.noisy_gate != ""
    yield (
        not recipe.tasks.retrieval.gradient_cache
        or moe.backend == "dropless"
        or not (noisy or (moe.drop_tokens and moe.capacity_factor != moe.eval_capacity_factor)),
        "tasks.retrieval.gradient_cache",
        "runs every forward twice, once in eval mode, and both must route the same: set moe.eval_capacity_factor to "
        f'moe.capacity_factor = {moe.capacity_factor}, moe.random_token_selection to false and moe.noisy_gate to ""',
    )
