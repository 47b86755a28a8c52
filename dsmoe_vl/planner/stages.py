"""The plans of a run's stages. A stage is a run that begins where the one before has ended, with another recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

from dsmoe_vl.config.recipe import each_stage
from dsmoe_vl.planner.flops import estimate_flops, full_step_flops
from dsmoe_vl.planner.memory import memory_for
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.trained import count_trained


def stage_plans(plan: RunPlan) -> Iterator[RunPlan]:
    """The plan of every stage: its parts, rate, schedule and estimates, and the step at which it ends as run.steps. The
    plan itself without stages."""
    if not plan.recipe.stages:
        yield plan
        return
    for recipe in each_stage(plan.recipe):
        (stage,) = recipe.stages
        deepspeed = copy.deepcopy(plan.deepspeed)
        deepspeed["optimizer"]["params"]["lr"] *= stage.lr_scale
        if "total_num_steps" in deepspeed.get("scheduler", {}).get("params", {}):
            deepspeed["scheduler"]["params"]["total_num_steps"] = stage.steps
        trained, flops = count_trained(recipe), estimate_flops(recipe)
        yield replace(
            plan,
            recipe=recipe,
            deepspeed=deepspeed,
            trained=trained,
            flops=flops,
            flops_per_step=full_step_flops(recipe, flops, plan.packs_per_step),
            memory=memory_for(
                deepspeed, plan.parameters, trained, plan.world_size, plan.ep_size, plan.precision == "bf16"
            ),
        )


def stage_after(plan: RunPlan, step: int) -> tuple[int, RunPlan]:
    """The number, from 1, and the plan of the stage that takes the step after `step`; of the last one at the end."""
    stages = list(stage_plans(plan))
    number = next((n for n, stage in enumerate(stages, 1) if step < stage.recipe.run.steps), len(stages))
    return number, stages[number - 1]
