"""Constraints between fields of a recipe, and between the recipe and the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

from dsmoe_vl.config.bounds import out_of_bounds
from dsmoe_vl.config.model_checks import Rule, model_rules, value_of
from dsmoe_vl.config.parts import LORA_PARTS
from dsmoe_vl.config.recipe import PIPE, DataConfig, Recipe, SourceConfig, learned_tasks
from dsmoe_vl.config.source_map import map_sha256
from dsmoe_vl.config.suggest import did_you_mean
from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.errors import ConfigError


def check_recipe(recipe: Recipe, world_size: int, file: str) -> None:
    """Raises ConfigError for the first violated constraint, with the value, the key, `file` and the fix."""
    for key, value, rule in out_of_bounds(recipe):
        raise ConfigError(f"{key} = {value!r} in {file}: {rule}")
    for rules in (
        model_rules(recipe),
        _data(recipe, world_size),
        _run(recipe),
        _lora(recipe),
    ):
        for satisfied, key, fix in rules:
            if not satisfied:
                raise ConfigError(f"{key} = {value_of(recipe, key)!r} in {file}: {fix}")
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
