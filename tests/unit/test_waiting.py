"""The host never waits for the device inside a micro-step: the whole model, its losses and their gradients compute on
tensors without data, on the branch that a GPU takes. Whatever reads a value back (`item`, `nonzero`, a copy to the
host) cannot run there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsmoe_vl.config.task_table import TranscriptConfig
from dsmoe_vl.data.pack import collate
from dsmoe_vl.objective.objective import Objective
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import build_backbone, build_tasks
from dsmoe_vl.tasks.task import MultiTaskModel
from tests.distributed.train_losses import ALL_TERMS, AS_OTHERS, MOE_AS_OTHERS, RECIPE
from tests.support.batches import SPEECH, mixed_pack

HEARS = replace(
    RECIPE, model=replace(RECIPE.model, speech=SPEECH), tasks=replace(RECIPE.tasks, transcript=TranscriptConfig(1.0)),
    data=replace(RECIPE.data, speech_max_seconds=3.0),
)  # fmt: skip
RECIPES = {
    "all tasks": RECIPE,
    "hears": HEARS,
    "as others": replace(RECIPE, model=AS_OTHERS, moe=replace(RECIPE.moe, **MOE_AS_OTHERS)),
    "every balancing term": replace(RECIPE, moe=replace(RECIPE.moe, **ALL_TERMS)),
    "isolated": replace(RECIPE, moe=replace(RECIPE.moe, routing="isolated", experts=6)),
    "sigmoid": replace(
        RECIPE, tasks=replace(RECIPE.tasks, retrieval=replace(RECIPE.tasks.retrieval, loss="sigmoid"))
    ),
}  # fmt: skip
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "bf16": {"enabled": True},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_a_micro_step_reads_nothing_back(name, recompute):
    recipe = RECIPES[name]
    plan = resolve(recipe, DEEPSPEED, 1, device="cpu", bf16_unit=True)
    batch = collate([mixed_pack(seed, hears=name == "hears") for seed in (1, 2)])
    batch = replace(batch, pairs_of_ranks=(len(batch.pair_ids),))
    with torch.device("meta"):
        model = MultiTaskModel(build_backbone(recipe, recompute), build_tasks(recipe, None)).bfloat16()
    output, stats = model(batch.to("meta"))
    objective = Objective(plan, "meta")
    objective.experts = objective.experts.to("meta")
    loss = objective(output, stats, batch.counts, None)
    loss.scalar.backward()
    assert model.backbone.embedding.weight.grad is not None
