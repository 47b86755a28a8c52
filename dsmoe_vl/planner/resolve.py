"""Recipe + DeepSpeed JSON + world size -> `RunPlan`. Every constraint between the files is checked here."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsmoe_vl.config.bounds import shown_key
from dsmoe_vl.config.checks import check_recipe
from dsmoe_vl.config.deepspeed_json import check_deepspeed, setting
from dsmoe_vl.config.recipe import Recipe, each_stage
from dsmoe_vl.config.source_map import map_hashes
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.counts import count_parameters
from dsmoe_vl.planner.flops import estimate_flops, full_step_flops
from dsmoe_vl.planner.memory import memory_for
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.trained import check_lora, check_train, count_trained

_MIRRORS = ("wandb", "comet", "csv_monitor")  # other programs that get the metrics, by DeepSpeed's monitors
_OUR_SECTIONS = ("expert_parallel", "tensorboard", *_MIRRORS)  # handled here; the engine must not see them
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_NEED_TOTAL_STEPS = ("WarmupCosineLR", "WarmupDecayLR")


@dataclass
class _Notes:
    """Collects the settings that the plan changes; with `strict` the first change is an error."""

    strict: bool
    lines: list[str] = field(default_factory=list)

    def add(self, problem: str, change: str, fix: str) -> None:
        if self.strict:
            raise ConfigError(f"{problem}. {fix}")
        self.lines.append(f"{problem}: {change}")


def resolve(
    recipe: Recipe,
    deepspeed: dict[str, Any],
    world_size: int,
    *,
    device: Literal["cpu", "cuda"],
    bf16_unit: bool,
    strict: bool = False,
    recipe_file: str = "the recipe",
    deepspeed_file: str = "the DeepSpeed JSON",
) -> RunPlan:
    """The plan of a run on `world_size` ranks.

    `bf16_unit`: the device has matrix units for bf16. A setting that is not possible is replaced, with a note; with
    `strict` it is an error. The file names appear in messages. `deepspeed` is not changed. Raises ConfigError.
    """
    if world_size < 1:
        raise ConfigError(f"world size {world_size} must be at least 1")
    check_deepspeed(deepspeed, deepspeed_file)
    check_recipe(recipe, world_size, recipe_file)
    check_lora(recipe, recipe_file)
    for index, stage in enumerate(each_stage(recipe)):
        check_train(stage, recipe_file, index)
    notes = _Notes(strict)
    engine = _without_nulls({key: value for key, value in deepspeed.items() if key not in _OUR_SECTIONS})
    micro_batch, accumulation = _batch(engine, world_size, deepspeed_file)
    ep_size = _ep_size(recipe, deepspeed, world_size, deepspeed_file, notes)
    precision = _precision(engine, device, bf16_unit, deepspeed_file, notes)
    _fill_schedule(engine, recipe, deepspeed_file, notes)
    recompute = _recompute(recipe, engine, deepspeed_file, notes)
    _check_rates(engine, recipe, deepspeed_file, recipe_file)
    _check_one_optimizer(engine, recipe, deepspeed_file)
    _check_backend(engine, recipe, deepspeed_file, recipe_file)

    packs = micro_batch * accumulation * world_size
    run_dir = Path(recipe.run.directory) / recipe.run.name
    zero_stage = setting(engine, "zero_optimization.stage", 0)
    parameters, trained = count_parameters(recipe), count_trained(recipe)
    flops = estimate_flops(recipe)
    return RunPlan(
        recipe=recipe,
        deepspeed=engine,
        device=device,
        world_size=world_size,
        dp_size=world_size,
        ep_size=ep_size,
        zero_stage=zero_stage,
        precision=precision,
        recompute=recompute,
        micro_batch=micro_batch,
        accumulation=accumulation,
        packs_per_step=packs,
        tokens_per_step=packs * recipe.data.pack_length,
        run_dir=run_dir,
        mirrors={name: deepspeed[name] for name in _MIRRORS if setting(deepspeed, f"{name}.enabled", False)},
        tensorboard_enabled=setting(deepspeed, "tensorboard.enabled", False),
        tensorboard_dir=_tensorboard_dir(deepspeed, run_dir),
        parameters=parameters,
        trained=trained,
        flops=flops,
        flops_per_step=full_step_flops(recipe, flops, packs),
        memory=memory_for(engine, parameters, trained, world_size, ep_size, precision == "bf16"),
        maps=map_hashes((*recipe.data.sources, *recipe.data.evaluation)),
        notes=tuple(notes.lines),
    )


def _without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    """A copy without keys whose value is null: DeepSpeed takes its default for an absent key, and fails for null."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else copy.deepcopy(value)
        for key, value in section.items()
        if value is not None
    }


def _batch(engine: dict[str, Any], world_size: int, file: str) -> tuple[int, int]:
    """Micro batch and accumulation by DeepSpeed's rules; completes all three keys of `engine`."""
    train, micro, accumulation = (engine.get(key) for key in _BATCH_KEYS)
    if train is None:
        if micro is None:
            raise ConfigError(f"train_micro_batch_size_per_gpu is missing in {file}: set the packs per rank, such as 4")
        train = micro * (accumulation or 1) * world_size
    if accumulation is None:
        accumulation = 1 if micro is None else train // (micro * world_size)
    if micro is None:
        micro = train // (accumulation * world_size)
    if train != micro * accumulation * world_size:
        raise ConfigError(
            f"train_batch_size = {train} in {file} is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {accumulation} x {world_size} ranks = {micro * accumulation * world_size}. "
            "Remove train_batch_size, which is computed from the others, or choose a multiple."
        )
    engine.update(zip(_BATCH_KEYS, (train, micro, accumulation), strict=True))
    return micro, accumulation


def _recompute(recipe: Recipe, engine: dict[str, Any], file: str, notes: _Notes) -> str:
    """The recipe's choice; without one, that of the DeepSpeed JSON."""
    of_json = "decoder" if "activation_checkpointing" in engine else "none"
    chosen = recipe.run.recompute or of_json
    if of_json == "decoder" and chosen in ("none", "moe"):
        notes.add(
            f'activation_checkpointing in {file} recomputes the decoder, but run.recompute = "{chosen}" asks for less',
            f"using {chosen}",
            f'remove the section, or set run.recompute = "{of_json}"',
        )
    return chosen


def _ep_size(recipe: Recipe, deepspeed: dict[str, Any], world_size: int, file: str, notes: _Notes) -> int:
    """The largest size, up to the requested one, that divides both the ranks and the experts."""
    if not setting(deepspeed, "expert_parallel.enabled", False):
        return 1
    asked: int = setting(deepspeed, "expert_parallel.autoep_size", 1)
    experts = math.gcd(*experts_of_layers(recipe)) or recipe.moe.experts
    fits = max(size for size in range(1, min(asked, world_size) + 1) if world_size % size == 0 and experts % size == 0)
    if fits < asked:
        layers = f"moe.experts_per_layer = {list(recipe.moe.experts_per_layer)}"
        per_layer = layers if recipe.moe.experts_per_layer else f"moe.experts = {experts}"
        obstacle = f"world size {world_size}" if world_size % asked else per_layer
        notes.add(
            f"expert_parallel.autoep_size = {asked} in {file} does not divide {obstacle}",
            f"using {fits}",
            f"Set it to {fits}, the largest that does.",
        )
    return fits


def _precision(
    engine: dict[str, Any], device: str, bf16_unit: bool, file: str, notes: _Notes
) -> Literal["fp32", "bf16"]:
    """bf16 if enabled, except on a CPU without bf16 matrix units: there fp32 is faster, 1.3 times with AVX512_BF16 and
    50 times on an AVX2 core, which emulates bf16 products."""
    if not setting(engine, "bf16.enabled", False):
        return "fp32"
    if device == "cpu" and not bf16_unit:
        notes.add(
            f"bf16.enabled = true in {file}, but this CPU has no bf16 matrix unit (AMX) and is faster in fp32",
            "using fp32",
            "Set bf16.enabled to false.",
        )
        engine["bf16"] = {"enabled": False}
        engine.pop("data_types", None)  # the precision of gradients, which follows
        return "fp32"
    return "bf16"


def _fill_schedule(engine: dict[str, Any], recipe: Recipe, file: str, notes: _Notes) -> None:
    """Fill in missing scheduler parameters from run.steps and the optimizer's learning rate."""
    run = recipe.run
    if "scheduler" not in engine:
        return
    params = engine["scheduler"].setdefault("params", {})
    if engine["scheduler"]["type"] in _NEED_TOTAL_STEPS:
        total = params.setdefault("total_num_steps", run.steps)
        if total != run.steps:
            notes.add(
                f"scheduler.params.total_num_steps = {total} in {file} differs from run.steps = {run.steps}",
                f"the learning rate follows {total} steps",
                "Remove total_num_steps: it is filled in from run.steps.",
            )
        warmup = params.get("warmup_num_steps", 1000)
        shortest = min((stage.steps for stage in recipe.stages), default=total)
        if warmup >= shortest:
            what = f"{shortest} steps of a stage" if recipe.stages else f"total of {shortest} steps"
            notes.add(
                f"scheduler.params.warmup_num_steps = {warmup} in {file} is not below the {what}",
                "the learning rate does not reach its peak",
                f"Set it below {shortest}.",
            )
    if engine["scheduler"]["type"] == "WarmupDecayLR":
        # DeepSpeed's default is 0.001 and ignores optimizer.params.lr.
        params.setdefault("warmup_max_lr", engine["optimizer"]["params"]["lr"])


def _check_rates(engine: dict[str, Any], recipe: Recipe, file: str, recipe_file: str) -> None:
    """Refuse schedules that set one rate for all parts, whatever theirs was."""
    kind = setting(engine, "scheduler.type", "WarmupCosineLR")
    keeps = kind == "WarmupCosineLR" or (
        kind == "WarmupLR" and setting(engine, "scheduler.params.warmup_max_lr", None) is None
    )
    tables = [("train", recipe.train)]
    tables += [(f"stages[{index}].train", stage.train) for index, stage in enumerate(recipe.stages)]
    others = [
        f"{name}.{shown_key(key)}.lr_scale = {part.lr_scale:g}"
        for name, table in tables
        for key, part in table.items()
        if part.lr_scale not in (None, 1)
    ]
    others += [
        f"stages[{index}].lr_scale = {stage.lr_scale:g}"
        for index, stage in enumerate(recipe.stages)
        if stage.lr_scale != 1
    ]
    if others and not keeps:
        raise ConfigError(
            f"{', '.join(others)} in {recipe_file}: scheduler.type = {json.dumps(kind)} in {file} gives "
            'all parts the same rate. Set it to "WarmupCosineLR", or remove the factors.'
        )


def _check_one_optimizer(engine: dict[str, Any], recipe: Recipe, file: str) -> None:
    """Refuse offload modes that update some weights with another optimizer, which has no proximal step."""
    for key, only in (("ratio", 1.0), ("super_offload", False)):
        path = f"zero_optimization.offload_optimizer.{key}"
        value = setting(engine, path, only)
        if recipe.objective.l1.weight and value != only:
            raise ConfigError(
                f"{path} = {json.dumps(value)} in {file}: objective.l1.weight = {recipe.objective.l1.weight} would not "
                f"reach every weight. Set it to {json.dumps(only)}, or objective.l1.weight to 0."
            )


def _check_backend(engine: dict[str, Any], recipe: Recipe, file: str, recipe_file: str) -> None:
    """DeepSpeed asserts this too, but only after the model is built."""
    if recipe.moe.backend == "capacity" and setting(engine, "zero_optimization.stage", 0) == 3:
        raise ConfigError(
            f'zero_optimization.stage = 3 in {file}: moe.backend = "capacity" in {recipe_file} works up to stage 2. '
            'Set the stage to 2, or moe.backend to "dropless".'
        )


def _tensorboard_dir(deepspeed: dict[str, Any], run_dir: Path) -> Path:
    """`output_path`/`job_name` as in DeepSpeed; by default inside the run directory, or under the run's name."""
    output_path = setting(deepspeed, "tensorboard.output_path", "")
    job_name = setting(deepspeed, "tensorboard.job_name", "")
    if not output_path:
        return run_dir / (job_name or "tensorboard")
    return Path(output_path) / (job_name or run_dir.name)
