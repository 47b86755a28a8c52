"""Global normalisation by hand: parts of one step, however they are split, add up to the same loss."""

import torch

from dsmoe_vl.config.model import MoEConfig
from dsmoe_vl.config.recipe import Recipe, SourceConfig
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.objective.objective import Objective
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.task import TaskOutput
from tests.distributed.train_losses import RECIPE

COUNTS = {"tokens": 10, "caption": 8}
FRACTION = torch.tensor([[[0.75, 0.25]]])


def plan(accumulation):
    recipe = Recipe(
        model=RECIPE.model,
        moe=MoEConfig(experts=2, top_k=1, ffn_width=8, first_dense_layers=2, balance_weight=0.5, z_weight=0.25),
        data=RECIPE.data,
        tokenizer=RECIPE.tokenizer,
    )
    assert recipe.data.sources == (SourceConfig("test", "unused"),)
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    return resolve(recipe, deepspeed, 1, device="cpu", bf16_unit=True)


def part(loss_sum, probabilities, z):
    sums = torch.zeros(1, 3, 3, 2)
    sums[0, 0, 0] = torch.tensor(probabilities)
    nothing = torch.zeros(1)
    stats = RouterStats(torch.zeros_like(sums), sums, torch.tensor([z]), torch.zeros(1, 3), nothing, torch.zeros(1, 20))
    return TaskOutput({"caption": torch.tensor(loss_sum)}), stats


def test_one_part_by_hand():
    loss = Objective(plan(1))(*part(16.0, [6.0, 4.0], 20.0), COUNTS, FRACTION)
    balance = 2 * (0.75 * 6 + 0.25 * 4) / 10
    assert loss.terms["loss_caption"] == 2.0
    torch.testing.assert_close(loss.terms["balance_loss"], torch.tensor(balance))
    torch.testing.assert_close(loss.terms["z_loss"], torch.tensor(2.0))
    torch.testing.assert_close(loss.scalar, torch.tensor(2.0 + 0.5 * balance + 0.25 * 2.0))


def test_unequal_parts_add_up():
    whole = Objective(plan(1))(*part(16.0, [6.0, 4.0], 20.0), COUNTS, FRACTION)
    objective = Objective(plan(2))
    parts = [
        objective(*part(15.0, [1.0, 1.5], 3.0), COUNTS, FRACTION),
        objective(*part(1.0, [5.0, 2.5], 17.0), COUNTS, FRACTION),
    ]
    torch.testing.assert_close(sum(p.terms["loss"] for p in parts), whole.terms["loss"])
    torch.testing.assert_close(sum(p.scalar for p in parts) / 2, whole.scalar)  # the engine averages over micro-steps


def test_a_step_without_targets_has_a_loss():
    loss = Objective(plan(1))(*part(0.0, [0.0, 0.0], 0.0), {"tokens": 0, "caption": 0}, FRACTION)
    assert loss.scalar == 0
