"""Constraints between fields of a recipe, and between the recipe and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from dsmoe_vl.config.bounds import out_of_bounds
from dsmoe_vl.config.parts import LORA_PARTS
from dsmoe_vl.config.recipe import PIPE, DataConfig, Recipe, SourceConfig, learned_tasks
from dsmoe_vl.config.source_map import map_sha256
from dsmoe_vl.config.suggest import did_you_mean
from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.errors import ConfigError

# Settings that need moe.backend = "capacity"; _DROPPING also need moe.drop_tokens.
_DROPPING = ("moe.capacity_factor", "moe.eval_capacity_factor", "moe.min_capacity", "moe.random_token_selection")
_CAPACITY = ("moe.drop_tokens", *_DROPPING, "moe.noisy_gate", "moe.residual")

Rule = tuple[bool, str, str]  # whether the recipe satisfies it, its key, the fix


def check_recipe(recipe: Recipe, world_size: int, file: str) -> None:
    """Raises ConfigError for the first violated constraint, with the value, the key, `file` and the fix."""
    for key, value, rule in out_of_bounds(recipe):
        raise ConfigError(f"{key} = {value!r} in {file}: {rule}")
    for rules in (
        _model(recipe),
        _rope_scaling(recipe),
        _moe(recipe),
        _capacity(recipe),
        _data(recipe, world_size),
        _run(recipe),
        _lora(recipe),
    ):
        for satisfied, key, fix in rules:
            if not satisfied:
                raise ConfigError(f"{key} = {_value(recipe, key)!r} in {file}: {fix}")
    learned = tuple(spec.name for spec in learned_tasks(recipe))
    method = recipe.objective.task_weights.method
    if method != "fixed" and len(learned) == 1:
        raise ConfigError(
            f"objective.task_weights.method = {method!r} in {file}: weighs tasks against each other, and "
            f'{learned[0]} is the only one: set "fixed"'
        )
    _check_stages(recipe, learned, file)
    for key in ("data.sources", "data.evaluation"):
        _check_sources(recipe.data, key, learned, file)


def _value(recipe: Recipe, key: str) -> object:
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
    fewest = min(pyramid or (moe.experts,))
    yield fewest >= 1, "moe.experts_per_layer", "every number must be at least 1"
    where = f"at most moe.experts = {moe.experts}"
    if pyramid:
        where = f"at most {fewest}, the smallest of moe.experts_per_layer = {list(pyramid)}"
    yield moe.top_k <= fewest, "moe.top_k", f"must be {where}"
    yield (
        moe.routing != "isolated" or moe.top_k <= fewest // 3,
        "moe.routing",
        f"gives each of three modalities {fewest // 3} of {fewest} experts per layer (moe.experts, "
        f"moe.experts_per_layer), fewer than moe.top_k = {moe.top_k}",
    )


def _capacity(recipe: Recipe) -> Iterator[Rule]:
    moe, defaults = recipe.moe, Recipe()
    for key in _CAPACITY:
        default = _value(defaults, key)
        yield (
            moe.backend == "capacity" or _value(recipe, key) == default,
            key,
            f'has no effect with moe.backend = "{moe.backend}": set moe.backend to "capacity", or leave {key} at '
            f"{default!r}",
        )
    for key in _DROPPING:
        default = _value(defaults, key)
        yield (
            moe.drop_tokens or _value(recipe, key) == default,
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
        f"must be at most data.pack_patches = {data.pack_patches}: an image must fit into one pack",
    )
    yield (
        data.image_max_patches // cell < data.pack_length,
        "data.image_max_patches",
        f"gives {data.image_max_patches // cell} tokens per image, no room for text in "
        f"data.pack_length = {data.pack_length}",
    )
    video_patches = data.video_frames * data.frame_max_patches
    yield (
        video_patches <= data.pack_patches,
        "data.frame_max_patches",
        f"with data.video_frames = {data.video_frames} gives {video_patches} patches per video; must be at most "
        f"data.pack_patches = {data.pack_patches}",
    )
    video_tokens = video_patches // (cell * data.frame_pool**2)
    yield (
        video_tokens < data.pack_length,
        "data.video_frames",
        f"gives {video_tokens} tokens per video, no room for text in data.pack_length = {data.pack_length}",
    )
    yield data.cache != "", "data.cache", "must name a folder on a local disk"
    readers = world_size * max(data.workers, 1)
    yield (
        data.lanes % readers == 0,
        "data.lanes",
        f"must be a multiple of {world_size} ranks x {max(data.workers, 1)} workers = {readers}; data.lanes is fixed "
        "for the whole run: change data.workers or the number of ranks, or set data.lanes for the largest run",
    )


def _run(recipe: Recipe) -> Iterator[Rule]:
    name = recipe.run.name
    yield name not in ("", ".", "..") and "/" not in name, "run.name", "must be the name of one folder"
    window = recipe.run.profile_steps
    yield (
        not window or (len(window) == 2 and 1 <= window[0] <= window[1]),
        "run.profile_steps",
        "must be the first and last step of the profiler trace, such as [20, 25], or [] for no trace",
    )
    patience = recipe.data.fetch_patience_seconds
    is_remote = any("://" in source.path or source.path.startswith(PIPE) for source in recipe.data.sources)
    yield (
        not is_remote or recipe.run.stall_seconds > patience,
        "run.stall_seconds",
        f"must be above data.fetch_patience_seconds = {patience}: else the run ends before storage may answer again",
    )
    yield recipe.run.directory != "", "run.directory", 'must name a folder, such as "runs"'
    first = f"tasks.{TASKS[0].name}.weight"
    yield bool(learned_tasks(recipe)), first, "the weights of all tasks are 0: set one of them above 0"
    yield recipe.tokenizer.path != "", "tokenizer.path", "must name a tokenizer.model or tokenizer.json file"


def _lora(recipe: Recipe) -> Iterator[Rule]:
    parts, choices = recipe.lora.parts, ", ".join(LORA_PARTS)
    known = [part in LORA_PARTS for part in parts]
    yield all(known), "lora.parts", f"adapters exist for {choices}: name some of these"
    yield len(set(parts)) == len(parts), "lora.parts", "names a part twice: name it once"
    yield len(parts) > 0 or not recipe.lora.rank, "lora.parts", f"names no part: name some of {choices}"


def _check_stages(recipe: Recipe, learned: tuple[str, ...], file: str) -> None:
    total = sum(stage.steps for stage in recipe.stages)
    if recipe.stages and total != recipe.run.steps:
        raise ConfigError(f"run.steps = {recipe.run.steps} in {file}: its stages have {total} steps: set it to that")
    for index, stage in enumerate(recipe.stages):
        place = f"stages[{index}].tasks in {file}"
        for name, factor in stage.tasks.items():
            if name not in learned:
                raise ConfigError(f"{place} names {name}. {did_you_mean(name, learned)}")
            if not factor >= 0:
                raise ConfigError(f"{place}: {name} = {factor} must not be negative")
        if all(stage.tasks.get(name, 1.0) == 0 for name in learned):
            raise ConfigError(f"{place}: the weights of all tasks are 0: set one of them above 0")


def _check_sources(data: DataConfig, key: str, learned: tuple[str, ...], file: str) -> None:
    sources = data.sources if key == "data.sources" else data.evaluation
    if not sources and key == "data.sources":
        raise ConfigError(f"{key} in {file} is empty: add [[{key}]] with a name and the path of a folder of shards")
    names: set[str] = set()
    for index, source in enumerate(sources):
        place = f"{key}[{index}] in {file}"
        if not source.name or source.name in names:
            raise ConfigError(f'{place}: name = "{source.name}" must be set, and different for every source')
        if not source.path:
            raise ConfigError(f'{place}: path of source "{source.name}" must name a folder of shards')
        _check_pipe(source, data.allow_pipe, place)
        if source.map:
            map_sha256(source.map, place)
        for task in source.tasks:
            if task not in learned:
                raise ConfigError(
                    f'{place}: tasks of source "{source.name}" name "{task}"; the recipe trains {", ".join(learned)} '
                    f"(weight above 0 in [tasks.NAME])"
                )
        names.add(source.name)


def _check_pipe(source: SourceConfig, allowed: bool, place: str) -> None:
    if not source.path.startswith(PIPE):
        return
    what = f'{place}: path = "{source.path}" of source "{source.name}"'
    if not allowed:
        raise ConfigError(f"{what} runs a shell command: set data.allow_pipe = true, or name a folder or a URL")
    if "{}" not in source.path:
        raise ConfigError(f'{what} needs {{}} in place of the file name, as in "{PIPE}cat shards/{{}}"')
