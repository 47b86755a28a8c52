"""[[stages]]: the plan of each stage, what its tasks weigh, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsmoe_vl.config.load import recipe_from_table
from dsmoe_vl.config.recipe import PartConfig, RunConfig, StageConfig, first_step, term_weights
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.plan import plan_to_json, recipe_from_json
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.stages import stage_after, stage_plans
from tests.distributed.train_losses import RECIPE

CONNECTOR = {"*": PartConfig(freeze=True), "connector": PartConfig(freeze=False)}
STAGES = (StageConfig(10, 2.0, CONNECTOR, {"retrieval": 0.0, "summary": 0.5}), StageConfig(20))


def staged(stages=STAGES, steps=30):
    return replace(RECIPE, stages=stages, run=RunConfig(steps=steps), train={"embedding": PartConfig(lr_scale=4.0)})


def plan(recipe, kind="WarmupCosineLR", **params):
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": {"type": kind, "params": {"warmup_num_steps": 4, **params}},
    }
    return resolve(recipe, deepspeed, 2, device="cpu", bf16_unit=False, recipe_file="my.toml", deepspeed_file="my.json")


def test_the_plan_of_each_stage():
    whole = plan(staged())
    first, second = stage_plans(whole)
    assert [first.recipe.run.steps, second.recipe.run.steps] == [10, 30]
    assert [first_step(first.recipe), first_step(second.recipe), first_step(whole.recipe)] == [0, 10, 0]
    schedules = [stage.deepspeed["scheduler"]["params"]["total_num_steps"] for stage in (first, second, whole)]
    assert schedules == [10, 20, 30]
    rates = [stage.deepspeed["optimizer"]["params"]["lr"] for stage in (first, second, whole)]
    assert rates == [2e-3, 1e-3, 1e-3]
    assert first.trained.parts == ("connector",) and second.trained == whole.trained
    assert first.memory.optimizer < 0.2 * second.memory.optimizer and second.memory == whole.memory
    assert first.flops_per_step < second.flops_per_step == whole.flops_per_step
    assert [stage_after(whole, step)[0] for step in (0, 9, 10, 29, 30)] == [1, 1, 2, 2, 2]
    assert list(stage_plans(plan(staged((), 30)))) == [plan(staged((), 30))]


def test_tasks_weigh_as_in_the_stage():
    first, second = (term_weights(stage.recipe) for stage in stage_plans(plan(staged())))
    assert second == term_weights(RECIPE) == term_weights(staged())
    assert first == second | {name: 0.5 * second[name] for name in ("summary", "importance", "ranking")} | {
        "retrieval": 0.0
    }


def test_dry_run_and_plan_json(tmp_path):
    whole = plan(staged())
    shown = describe(whole)
    assert "\nstage 1: steps 1 to 10\n" in shown and "\nstage 2: steps 11 to 30\n" in shown
    assert "retrieval x 0, summary x 0.5\n" in shown and "0.002 at its peak\n" in shown and "what trains" not in shown
    path = tmp_path / "plan.json"
    path.write_text(plan_to_json(whole))
    assert recipe_from_json(path) == whole.recipe


def test_a_stage_shorter_than_the_warm_up_is_noted():
    notes = plan(staged(), warmup_num_steps=12).notes
    assert notes[0].startswith("scheduler.params.warmup_num_steps = 12 in my.json is not below the 10 steps of a stage")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((StageConfig(10), StageConfig(10)), r"^run\.steps = 30 in my\.toml: its stages have 20 steps: set it to that"),
        ((StageConfig(30), StageConfig()), r"^stages\[1\]\.steps = 0 in my\.toml: must be at least 1"),
        ((StageConfig(30, 0.0),), r"^stages\[0\]\.lr_scale = 0\.0 in my\.toml: must be above 0"),
        (
            (StageConfig(10), StageConfig(20, train={"visoin": PartConfig(freeze=True)})),
            r'^stages\[1\]\.train\.visoin in my\.toml is about no parameter .*Did you mean "vision"',
        ),
        ((StageConfig(30, train={"*": PartConfig(freeze=True)}),), r"^train in my\.toml freezes every parameter"),
        (
            (StageConfig(30, tasks={"captoin": 1.0}),),
            r'^stages\[0\]\.tasks in my\.toml names captoin\. Did .*"caption"',
        ),
        ((StageConfig(30, tasks={"caption": -1.0}),), r"^stages\[0\]\.tasks in my\.toml: caption = -1\.0 must not be"),
        (
            (StageConfig(30, tasks=dict.fromkeys(("caption", "retrieval", "summary"), 0.0)),),
            r"^stages\[0\]\.tasks in my\.toml: the weights of all tasks are 0",
        ),
    ],
)
def test_what_is_refused(stages, message):
    with pytest.raises(ConfigError, match=message):
        plan(staged(stages))


def test_rates_of_stages_need_a_schedule_that_keeps_them():
    constant = replace(staged(), train={})
    with pytest.raises(
        ConfigError, match=r"^stages\[0\]\.lr_scale = 2 in my\.toml: scheduler\.type = \"WarmupDecayLR\""
    ):
        plan(constant, "WarmupDecayLR")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"stages": [{"steps": 3, "learning_rate": 1}]},
            r"^stages\[0\]\.learning_rate in my\.toml is not a recipe key",
        ),
        (
            {"stages": [{"tasks": {"caption": "1"}}]},
            r"^stages\[0\]\.tasks\.caption in my\.toml is '1'; it must be a num",
        ),
        ({"stages": {"steps": 3}}, r"^stages in my\.toml must be an array of tables: write \[\[stages\]\]"),
    ],
)
def test_wrong_keys_and_values(table, message):
    with pytest.raises(ConfigError, match=message):
        recipe_from_table(table, "my.toml")
