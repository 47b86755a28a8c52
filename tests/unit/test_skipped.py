"""Skipped steps: how they are counted and named, when a run ends, and what they leave out of an interval's means."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dsmoe_vl.config.recipe import L1Config
from dsmoe_vl.errors import ConfigError, DivergedError, as_user_error
from dsmoe_vl.monitor.board import tag
from dsmoe_vl.monitor.symptoms import Facts, non_finite
from dsmoe_vl.optim.l1 import add_proximal_step
from dsmoe_vl.optim.overflow import add_overflow
from dsmoe_vl.training.skipped import Skipped, SkippedSteps
from dsmoe_vl.training.step import StepResult, _spreading
from dsmoe_vl.training.window import Window
from tests.unit.test_resolve import moe, plan, quickstart

LOSS = Skipped(("loss_caption", "loss"), tuple(f"photo-{n}" for n in range(8)))


def steps(most=3):
    recipe = quickstart()
    return SkippedSteps(plan(replace(recipe, run=replace(recipe.run, max_skipped_steps=most)), moe()))


def test_so_many_in_a_row_end_the_run():
    skipped = steps()
    for at, step in enumerate([LOSS, None, LOSS, LOSS, LOSS]):
        assert not skipped.are_too_many(is_end=False)
        skipped.count(step)
        assert skipped.in_row == (1, 0, 1, 2, 3)[at]
    assert skipped.are_too_many(is_end=False)


@pytest.mark.parametrize(("most", "in_row", "ends"), [(3, 1, False), (3, 2, True), (1, 1, True)])
def test_a_run_does_not_end_well_with_two(most, in_row, ends):
    skipped = steps(most)
    for _ in range(in_row):
        skipped.count(LOSS)
    assert skipped.are_too_many(is_end=True) == ends


def test_the_error_names_step_terms_sources_samples_and_the_fix():
    skipped = steps()
    for _ in range(3):
        skipped.count(LOSS)
    error = skipped.error(12, 8)
    assert isinstance(error, DivergedError) and as_user_error(error) is error
    for word in (
        "step 12 was skipped as the 3rd in a row (run.max_skipped_steps = 3)", "data sources images, videos",
        "loss_caption, loss not finite, samples photo-0, photo-1, photo-2, photo-3, photo-4 and 3 more", "of step 8",
        "optimizer.params.lr", "gradient_clipping", "warmup_num_steps",
    ):  # fmt: skip
        assert word in str(error)
    assert "There is no checkpoint yet" in str(skipped.error(12, 0))
    assert skipped.line(12).startswith(
        "step 12 skipped, 3 in a row (run.max_skipped_steps = 3): loss_caption, loss not"
    )


def test_a_skipped_step_names_terms_else_parts_else_the_gradient():
    bad, good = torch.tensor(math.inf), torch.tensor(1.0)
    of_step = Skipped.of_step
    assert of_step({"loss_caption": bad, "z_loss": good}, {"experts": bad}, ()).names == ("loss_caption",)
    assert of_step({"loss": good}, {"experts": bad, "vision": good}, ()).names == ("the gradient of experts",)
    assert str(of_step({"loss": good}, {}, ())) == "the gradient not finite"


def test_the_limit_is_at_least_one():
    recipe = quickstart()
    with pytest.raises(ConfigError, match=r"run\.max_skipped_steps = 0 .*must be at least 1"):
        plan(replace(recipe, run=replace(recipe.run, max_skipped_steps=0)), moe())


@pytest.mark.parametrize("value", [2.5, -1e-30, 1e38, math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_such_a_gradient(value):
    weight = torch.tensor(3.0, requires_grad=True)
    loss = weight - 3.0 + value
    _spreading(loss).backward()
    if math.isfinite(value):
        assert torch.equal(_spreading(loss), loss) and weight.grad == 1
    else:
        assert weight.grad.isnan()


def test_overflow_stops_the_optimizer_and_the_proximal_step():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"name": "matrices", "params": [weight]}], lr=0.1, fused=True)
    add_overflow(optimizer)
    add_proximal_step(optimizer, L1Config(weight=0.5, matrices=1.0))
    weight.grad = torch.ones(3)
    optimizer.step()
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    optimizer.overflow = True
    weight.grad = torch.full((3,), math.nan)
    optimizer.step()
    assert all(map(torch.equal, before, [weight.detach(), *optimizer.state[weight].values()]))
    optimizer.overflow = False
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(before[0], weight)


def result(loss, skipped=None):
    counts = {"tokens": 10, "patches": 0, "labels": 5}
    return StepResult({"loss": torch.tensor(loss)}, None, counts, 1e-3, loss, skipped=skipped)


def test_means_leave_skipped_steps_out():
    window = Window(plan(quickstart(), moe()))
    for step in (result(2.0), result(math.nan, LOSS), result(4.0)):
        window.add(step)
        window.time(1.0, 0.0)
    values = window.close()
    assert (values["loss"], values["skipped_steps"], values["grad_norm"]) == (3.0, 1, 4.0)
    assert values["tokens_per_second"] == 10 and values["step_ms"] == 1000
    window.add(result(math.nan, LOSS))
    window.time(1.0, 0.0)
    values = window.close()
    assert math.isnan(values["loss"]) and math.isnan(values["grad_norm"])
    assert (values["skipped_steps"], values["lr"]) == (1, 1e-3)
    assert tag("skipped_steps") == "train/skipped_steps"


def test_skipped_steps_are_a_warning_sign():
    facts = Facts(experts=0, top_k=1, task_routing=False, from_start=True)
    assert non_finite([{"step": 5, "loss": 1.0, "skipped_steps": 0}], facts) is None
    text = non_finite([{"step": 5, "loss": 1.0, "skipped_steps": 2}], facts)
    assert text is not None and text.startswith("steps skipped since the last line: 2")
