"""The run plan, computed from a recipe, a DeepSpeed JSON and a world size. Every run saves it as `plan.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dsmoe_vl.config.load import recipe_from_table
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import require_regular
from dsmoe_vl.planner.counts import ParameterCounts, count_parameters
from dsmoe_vl.planner.flops import Flops
from dsmoe_vl.planner.memory import MemoryEstimate
from dsmoe_vl.planner.trained import Trained

# What `run.recompute` says of the layers, in words.
RECOMPUTED_TEXT = {
    "none": "nothing recomputed",
    "moe": "experts recomputed",
    "decoder": "decoder layers recomputed",
    "all": "all layers recomputed",
}


@dataclass(frozen=True)
class RunPlan:
    """Settings and estimates that are known before a process group or a model exists. Built by `resolve`."""

    recipe: Recipe
    deepspeed: dict[str, Any]  # for `deepspeed.initialize`: complete, without the sections that are handled here
    device: Literal["cpu", "cuda"]
    world_size: int
    dp_size: int  # data-parallel ranks: all of them
    ep_size: int  # ranks per expert-parallel group, which has every expert once
    zero_stage: int
    precision: Literal["fp32", "bf16"]
    recompute: str  # what the backward pass computes again: a key of `RECOMPUTED`
    micro_batch: int  # packs per rank and micro-step
    accumulation: int  # micro-steps per optimizer step
    packs_per_step: int  # over all ranks
    tokens_per_step: int  # over all ranks, padding included
    run_dir: Path
    mirrors: dict[str, Any]  # the JSON's sections of other programs that get the metrics too
    tensorboard_enabled: bool
    tensorboard_dir: Path  # of the event files
    parameters: ParameterCounts
    trained: Trained
    flops: Flops
    flops_per_step: float  # training, over all ranks, for packs with the maximum number of patches
    memory: MemoryEstimate  # of one rank
    maps: dict[str, str]  # SHA-256 of the files with transformations of sources, by `map`
    notes: tuple[str, ...]  # where the plan differs from the given settings

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs per position of a full pack, including its share of the patches and labels."""
        return self.flops_per_step / 3 / self.tokens_per_step

    @property
    def ep_groups(self) -> list[range]:
        """Ranks that exchange tokens: each group has every expert once."""
        return [range(start, start + self.ep_size) for start in range(0, self.world_size, self.ep_size)]

    @property
    def expert_data_groups(self) -> list[range]:
        """Ranks that have the same experts and average their gradients."""
        return [range(start, self.world_size, self.ep_size) for start in range(self.ep_size)]


def plan_to_json(plan: RunPlan) -> str:
    """The plan as JSON text; `recipe_from_json` reads the recipe back exactly."""
    return json.dumps({**asdict(plan), "parameters": _counts(plan.parameters)}, indent=2, default=str) + "\n"


def plan_with(path: Path, recipe: Recipe) -> str:
    """A run's plan.json as JSON text, with the recipe of the model that an export of it has, and its parameters."""
    table = json.loads(path.read_text(encoding="utf-8"))
    table |= {"recipe": asdict(recipe), "parameters": _counts(count_parameters(recipe))}
    return json.dumps(table, indent=2, default=str) + "\n"


def _counts(parameters: ParameterCounts) -> dict[str, int]:
    return {"total": parameters.total, "active": parameters.active, **asdict(parameters)}


def changed_settings(plan: RunPlan, path: Path) -> list[str]:
    """Settings of recipe and DeepSpeed JSON that differ from a run's `plan.json`: "run.steps 100 -> 200".

    [] if the file is absent or unreadable. Recipe keys that only one of them has are skipped: another version wrote it.
    In the DeepSpeed JSON they are changes of the user, such as a scheduler that was removed.
    """
    try:
        before, now = json.loads(require_regular(path).read_text(encoding="utf-8")), json.loads(plan_to_json(plan))
        recipes, engines = ((dict(before[part]), now[part]) for part in ("recipe", "deepspeed"))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [*_differences(*recipes, "", both=True), *_differences(*engines, "", both=False)]


def _differences(before: Any, now: Any, name: str, both: bool) -> Iterator[str]:
    """`both`: keys that only one side has are skipped."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            inner = f"{name}.{key}" if name else key
            if key in before and key in now:
                # The tables in [train] are named by the user.
                yield from _differences(before[key], now[key], inner, both and inner != "train")
            elif not both:
                yield f"{inner} {_or_absent(before, key)} -> {_or_absent(now, key)}"
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{name}[{number}]", both)
    elif before != now:
        yield f"{name} {json.dumps(before)} -> {json.dumps(now)}"


def _or_absent(section: dict[str, Any], key: str) -> str:
    return json.dumps(section[key]) if key in section else "(absent)"


def recipe_from_json(path: Path) -> Recipe:
    """The recipe in a run's `plan.json`. Raises ConfigError for a missing, broken or foreign file."""
    try:
        table = json.loads(require_regular(path).read_text(encoding="utf-8"))["recipe"]
    except OSError as error:
        raise ConfigError(
            f"run plan {path} cannot be read: {error.strerror}. Name a run directory, such as runs/quickstart."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"run plan {path} is not a plan.json written by training. Name another run.") from None
    return recipe_from_table(table, str(path))
