"""From a run plan to a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import nn

from dsmoe_vl.config.plan import RunPlan
from dsmoe_vl.model.init import initialise
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.moe.layer import spread_experts
from dsmoe_vl.optim.adamw import adamw_builder, parameter_groups
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.tasks.task import MultiTaskModel, Task


def build_engine(plan: RunPlan, ranks: Ranks, tasks: tuple[Task, ...]) -> Any:
    """The engine around a freshly initialised model, its experts spread over `plan.ep_size` ranks."""
    backbone = VisionLanguageModel(plan.recipe, plan.activation_checkpointing)
    initialise(backbone, plan.recipe.run.seed)
    model = MultiTaskModel(backbone, tasks)
    spread_experts(model, plan.ep_size, ranks.rank % plan.ep_size)
    return wrap(plan, model)


def wrap(plan: RunPlan, model: nn.Module) -> Any:
    """`deepspeed.initialize` with our optimizer. The config has no expert_parallel section: the layers exist."""
    config = {
        key: value for key, value in plan.deepspeed.items() if key not in ("optimizer", "activation_checkpointing")
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        optimizer=adamw_builder(plan),
        config=config,
    )
    return engine
