"""The constraints between a recipe's fields, and between the recipe and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from dsmoe_vl.config.recipe import Recipe, SourceConfig
from dsmoe_vl.errors import ConfigError

_AT_LEAST_ONE = (
    "model.width",
    "model.layers",
    "model.heads",
    "model.kv_heads",
    "model.ffn_width",
    "model.rope_base",
    "model.vision.patch_size",
    "model.vision.merge",
    "model.vision.width",
    "model.vision.layers",
    "model.vision.heads",
    "model.vision.ffn_width",
    "moe.experts",
    "moe.top_k",
    "moe.ffn_width",
    "data.pack_length",
    "data.pack_patches",
    "data.image_max_patches",
    "data.frame_max_patches",
    "data.video_frames",
    "data.frame_pool",
    "data.lanes",
    "data.lookahead",
    "data.shuffle_block",
    "tokenizer.vocab_size",
    "run.steps",
    "run.log_every",
    "run.evaluate_packs",
    "run.checkpoint_every",
    "run.keep_checkpoints",
)
_NOT_NEGATIVE = (
    "moe.shared_ffn_width",
    "moe.first_dense_layers",
    "moe.balance_weight",
    "moe.z_weight",
    "data.workers",
    "data.max_bad_fraction",
    "run.seed",
    "run.evaluate_every",
)

Rule = tuple[bool, str, str]  # holds, key, what to do where it does not


def check_recipe(recipe: Recipe, world_size: int, file: str) -> None:
    """Raises ConfigError for the first constraint that does not hold, naming the value, the key, `file` and the fix."""
    for rules in (_ranges(recipe), _model(recipe), _data(recipe, world_size), _run(recipe)):
        for holds, key, fix in rules:
            if not holds:
                raise ConfigError(f"{key} = {_value(recipe, key)!r} in {file}: {fix}")
    _check_sources(recipe.data.sources, "data.sources", file)
    _check_sources(recipe.data.evaluation, "data.evaluation", file)


def _value(recipe: Recipe, key: str) -> object:
    return reduce(getattr, key.split("."), recipe)


def _ranges(recipe: Recipe) -> Iterator[Rule]:
    for key in _AT_LEAST_ONE:
        yield _value(recipe, key) >= 1, key, "must be at least 1"  # type: ignore[operator]
    for key in _NOT_NEGATIVE:
        yield _value(recipe, key) >= 0, key, "must not be negative"  # type: ignore[operator]
    yield recipe.data.max_bad_fraction <= 1, "data.max_bad_fraction", "is a fraction, at most 1"


def _model(recipe: Recipe) -> Iterator[Rule]:
    model, vision, moe = recipe.model, recipe.model.vision, recipe.moe
    yield model.width % model.heads == 0, "model.width", f"must be a multiple of model.heads = {model.heads}"
    head = model.width // model.heads
    yield head % 2 == 0, "model.heads", f"leaves {head} features a head; rotary positions need an even number"
    yield model.heads % model.kv_heads == 0, "model.kv_heads", f"must divide model.heads = {model.heads}"
    yield (
        vision.width % (4 * vision.heads) == 0,
        "model.vision.width",
        f"must be a multiple of 4 x model.vision.heads = {4 * vision.heads}: rows and columns are rotated in pairs",
    )
    yield moe.top_k <= moe.experts, "moe.top_k", f"must be at most moe.experts = {moe.experts}"
    yield (
        moe.first_dense_layers <= model.layers,
        "moe.first_dense_layers",
        f"must be at most model.layers = {model.layers}",
    )


def _data(recipe: Recipe, world_size: int) -> Iterator[Rule]:
    data, cell = recipe.data, recipe.model.vision.merge**2
    yield (
        data.pack_patches % cell == 0,
        "data.pack_patches",
        f"must be a multiple of model.vision.merge**2 = {cell}, such as {(data.pack_patches // cell + 1) * cell}",
    )
    for key, budget in (("image", data.image_max_patches), ("frame", data.frame_max_patches)):
        yield budget >= cell, f"data.{key}_max_patches", f"must be at least model.vision.merge**2 = {cell}"
    yield (
        data.image_max_patches <= data.pack_patches,
        "data.image_max_patches",
        f"must be at most data.pack_patches = {data.pack_patches}: an image is not cut in two",
    )
    yield (
        data.image_max_patches // cell < data.pack_length,
        "data.image_max_patches",
        f"makes {data.image_max_patches // cell} tokens; no text fits beside them in "
        f"data.pack_length = {data.pack_length}",
    )
    video_patches = data.video_frames * data.frame_max_patches
    yield (
        video_patches <= data.pack_patches,
        "data.frame_max_patches",
        f"with data.video_frames = {data.video_frames} makes {video_patches} patches a video; at most "
        f"data.pack_patches = {data.pack_patches} fit",
    )
    video_tokens = video_patches // (cell * data.frame_pool**2)
    yield (
        video_tokens < data.pack_length,
        "data.video_frames",
        f"makes {video_tokens} tokens a video; no text fits beside them in data.pack_length = {data.pack_length}",
    )
    readers = world_size * max(data.workers, 1)
    yield (
        data.lanes % readers == 0,
        "data.lanes",
        f"must be a multiple of {world_size} ranks x {max(data.workers, 1)} workers = {readers}; lanes stay fixed for "
        "the life of a run, so change data.workers or the number of ranks, or choose lanes for the largest of them",
    )


def _run(recipe: Recipe) -> Iterator[Rule]:
    name = recipe.run.name
    yield name not in ("", ".", "..") and "/" not in name, "run.name", "must be the name of one folder"
    yield recipe.run.directory != "", "run.directory", 'must name a folder, such as "runs"'
    yield recipe.tasks.caption.weight > 0, "tasks.caption.weight", "must be above 0: it is the only task"
    yield recipe.tokenizer.path != "", "tokenizer.path", "must name a tokenizer.model file"


def _check_sources(sources: tuple[SourceConfig, ...], key: str, file: str) -> None:
    if not sources and key == "data.sources":
        raise ConfigError(f"{key} in {file} is empty: add [[{key}]] with a name and the path of a folder of shards")
    names: set[str] = set()
    for index, source in enumerate(sources):
        place = f"{key}[{index}] in {file}"
        if not source.name or source.name in names:
            raise ConfigError(f'{place}: name = "{source.name}" must be given and differ from the others')
        if not source.path:
            raise ConfigError(f'{place}: path of source "{source.name}" must name a folder of shards')
        if source.weight <= 0:
            raise ConfigError(f'{place}: weight = {source.weight} of source "{source.name}" must be above 0')
        names.add(source.name)
