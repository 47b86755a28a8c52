"""Learning rates by part: the groups, the schedule's values, and real steps against the rate written elsewhere."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupLR
from torch import nn

from dsmoe_vl.config.recipe import LearningRateConfig
from dsmoe_vl.optim.parameter_groups import PARTS, parameter_groups, part_of, rate_of
from dsmoe_vl.tasks.registry import build_backbone
from tests.distributed.train_losses import RECIPE

FACTORS = LearningRateConfig(vision=0.25, experts=0.5, router=0.25)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.ModuleDict({"backbone": build_backbone(RECIPE)})


def test_every_part_has_a_factor():
    assert tuple(LearningRateConfig.__dataclass_fields__) == PARTS


def test_every_parameter_is_in_one_group_with_the_rate_of_its_part(model):
    rates = {id(value): group["lr"] for group in parameter_groups(model, 1e-2, FACTORS) for value in group["params"]}
    assert rates == {id(value): 1e-2 * getattr(FACTORS, part_of(name)) for name, value in model.named_parameters()}
    assert sum(len(group["params"]) for group in parameter_groups(model, 1e-2, FACTORS)) == len(rates)


def test_one_rate_makes_no_more_groups(model):
    assert [group["name"] for group in parameter_groups(model, 1e-2, LearningRateConfig())] == ["matrices", "vectors"]


@pytest.mark.parametrize(
    "schedule", [lambda of: WarmupCosineLR(of, 20, warmup_num_steps=4), lambda of: WarmupLR(of, warmup_num_steps=4)]
)
def test_the_schedule_keeps_the_factors(model, schedule):
    groups = parameter_groups(model, 1e-2, FACTORS)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-2)
    ours, theirs = schedule(optimizer), schedule(plain)
    for _ in range(12):
        ours.step()
        theirs.step()
        expected = plain.param_groups[0]["lr"]
        assert rate_of(optimizer) == pytest.approx(expected, rel=1e-12)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["rate_factor"], rel=1e-12)
