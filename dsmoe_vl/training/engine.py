"""Builds the DeepSpeed engine of a run plan."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from dsmoe_vl.model.init import initialise
from dsmoe_vl.moe.expert_parallel import spread_experts
from dsmoe_vl.optim.l1 import add_proximal_step
from dsmoe_vl.optim.optimizer import optimizer_builder
from dsmoe_vl.optim.overflow import add_overflow
from dsmoe_vl.optim.parameter_groups import parameter_groups
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.tasks.registry import build_backbone
from dsmoe_vl.tasks.task import MultiTaskModel, Task


def build_engine(plan: RunPlan, ranks: Ranks, tasks: tuple[Task, ...]) -> Any:
    """The engine around a freshly initialised model, its experts spread over `plan.ep_size` ranks."""
    engine = wrap(plan, build_model(plan, ranks, tasks))
    torch.manual_seed(plan.recipe.run.seed * 2**20 + ranks.rank)  # for routing noise: a different seed on every rank
    return engine


def build_model(plan: RunPlan, ranks: Ranks, tasks: tuple[Task, ...]) -> MultiTaskModel:
    """The module that the engine wraps, with this rank's experts only."""
    backbone = build_backbone(plan.recipe, plan.activation_checkpointing)
    initialise(backbone, plan.recipe.run.seed)
    model = MultiTaskModel(backbone, tasks)
    spread_experts(model, plan, ranks.rank % plan.ep_size)
    return model


def wrap(plan: RunPlan, model: nn.Module) -> Any:
    """`deepspeed.initialize` with our optimizer. No expert_parallel section: the expert layers are already built."""
    config = {
        key: value for key, value in plan.deepspeed.items() if key not in ("optimizer", "activation_checkpointing")
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        optimizer=optimizer_builder(plan),
        config=config,
    )
    if engine.optimizer is engine.basic_optimizer:  # ZeRO-0 in fp32
        add_overflow(engine.basic_optimizer)
    # Not earlier: at ZeRO-0 in bf16, initialize takes a step without gradients to create the optimizer state.
    add_proximal_step(engine.basic_optimizer, plan.recipe.objective.l1)
    return engine


def full_gradient(parameter: nn.Parameter) -> Tensor:
    """The full gradient of a parameter that ZeRO partitions, between the last backward of a step and the update.

    For an expert: the gradient of this rank's slice. Collective.
    """
    gradient = safe_get_full_grad(parameter)
    assert gradient is not None, "a parameter has no gradient"
    return gradient
