"""[train]: which parameters train and how; the optimizer's groups, the schedule's values, the plan and its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupLR
from torch import nn

from dsmoe_vl.config.load import load_recipe, recipe_from_table
from dsmoe_vl.config.parts import PARTS, part_of
from dsmoe_vl.config.recipe import PartConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.optim.parameter_groups import parameter_groups, rate_of
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.plan import changed_settings, plan_to_json, recipe_from_json
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.trained import Rule, changed_parts, count_trained, rules
from dsmoe_vl.tasks.registry import build_backbone
from tests.distributed.train_losses import RECIPE

OWN = tuple(part for part in PARTS if part != "speech")  # of a model that does not hear

JSON = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
RATES = {"*": PartConfig(lr_scale=0.5), "vision": PartConfig(lr_scale=0.25), "layers.0.*": PartConfig(weight_decay=0.3)}


def recipe(**train):
    """The tests' model with these tables in [train]; a name like layers_0 stands for layers.0.*"""
    named = {key.replace("_0", ".0.*"): PartConfig(**table) for key, table in train.items()}
    return replace(RECIPE, train=named)


def plan(of, **more):
    return resolve(of, JSON | more, 1, device="cpu", bf16_unit=False, recipe_file="my.toml", deepspeed_file="my.json")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_backbone(RECIPE)


def groups(model, train):
    rule_of = rules(replace(RECIPE, train=train))
    return parameter_groups(model, 1e-2, lambda name: rule_of[name])


def test_the_planner_knows_every_parameter(model):
    assert list(rules(RECIPE)) == [name for name, _ in model.named_parameters()]
    assert {part_of(name) for name in rules(RECIPE)} == set(OWN)


def test_later_tables_count():
    found = rules(recipe(attention={"freeze": True, "lr_scale": 2.0}, layers_0={"freeze": False}))
    assert found["layers.0.attention.out.weight"] == Rule(False, 2.0)
    assert found["layers.1.attention.out.weight"] == Rule(True, 2.0)
    assert found["layers.0.feed_forward.down.weight"] == Rule() == found["vision.layers.0.attention.out.weight"]


def test_every_parameter_is_in_one_group_with_its_rate_and_decay(model):
    rule_of = rules(replace(RECIPE, train=RATES))
    found = {id(value): group for group in groups(model, RATES) for value in group["params"]}
    assert sum(len(group["params"]) for group in groups(model, RATES)) == len(found) == len(rule_of)
    for name, value in model.named_parameters():
        assert found[id(value)]["lr"] == 1e-2 * rule_of[name].lr_scale
        decay = 0.0 if value.dim() < 2 or name.endswith("_bias") else rule_of[name].weight_decay
        assert found[id(value)].get("weight_decay") == decay


def test_what_is_frozen_is_in_no_group(model):
    train = {"vision": PartConfig(freeze=True), "*.experts.*": PartConfig(freeze=True)}
    kept = {id(value) for group in groups(model, train) for value in group["params"]}
    names = {name for name, value in model.named_parameters() if id(value) not in kept}
    assert names == {name for name in rules(RECIPE) if part_of(name) in ("vision", "experts")}


def test_one_rate_makes_no_more_groups(model):
    assert [group["name"] for group in groups(model, {})] == ["matrices", "vectors"]
    assert [group["name"] for group in groups(model, {"*": PartConfig(lr_scale=3.0)})] == ["matrices", "vectors"]


@pytest.mark.parametrize(
    "schedule", [lambda of: WarmupCosineLR(of, 20, warmup_num_steps=4), lambda of: WarmupLR(of, warmup_num_steps=4)]
)
def test_the_schedule_keeps_the_factors(model, schedule):
    optimizer = torch.optim.AdamW(groups(model, RATES), lr=1e-2)
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-2)
    ours, theirs = schedule(optimizer), schedule(plain)
    for _ in range(12):
        ours.step()
        theirs.step()
        expected = plain.param_groups[0]["lr"]
        assert rate_of(optimizer) == pytest.approx(expected, rel=1e-12)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["rate_factor"], rel=1e-12)


ALL_PARTS = ", ".join(OWN)
WRONG = [
    ({"visoin": {"freeze": True}}, r'^train\.visoin in my\.toml is about no parameter .*Did you mean "vision"\? Its '
     rf"parts are {ALL_PARTS}; a pattern is compared with names such as vision\."),
    ({"layers.7.*": {"freeze": True}}, r'^train\."layers\.7\.\*" in my\.toml is about no parameter'),
    ({"vision": {"freeze": True, "lr_scale": 0.1}}, r"^train\.vision\.lr_scale = 0\.1 in my\.toml has no effect, "
     rf"because all of it is frozen: .*The parts are {ALL_PARTS}$"),
    ({"vision": {"weight_decay": 0.1}, "*": {"freeze": True}, "heads": {"freeze": False}},
     r"^train\.vision\.weight_decay = 0\.1 in my\.toml has no effect, because all of it is frozen"),
    ({"*norm.weight": {"weight_decay": 0.1}}, r'^train\."\*norm\.weight"\.weight_decay = 0\.1 .* norms and biases'),
    ({"*": {"freeze": True}}, rf"^train in my\.toml freezes every parameter: let something train, of {ALL_PARTS}$"),
    ({"vision": {"lr_scale": 0}}, r"^train\.vision\.lr_scale = 0\.0 in my\.toml: must be above 0"),
    ({"layers.0.*": {"weight_decay": -1}}, r'^train\."layers\.0\.\*"\.weight_decay = -1\.0 in my\.toml: must not be'),
]  # fmt: skip


@pytest.mark.parametrize(("train", "message"), WRONG)
def test_tables_without_a_sense(train, message):
    found = recipe_from_table({"train": train}, "my.toml").train
    with pytest.raises(ConfigError, match=message):
        plan(replace(RECIPE, train=found))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"vision": {"frozen": True}}, r'^train\.vision\.frozen in my\.toml .* Did you mean "train\.vision\.freeze"'),
        ({"a.*": {"freeze": 1}}, r'^train\."a\.\*"\.freeze in my\.toml is 1; it must be true or false'),
        ({"vision": {"lr_scale": "0.1"}}, r"^train\.vision\.lr_scale in my\.toml is '0\.1'; it must be a number"),
        ({"vision": 3}, r"^train\.vision in my\.toml is 3; it must be a table: write \[train\.vision\]"),
        (3, r"^train in my\.toml is 3; it must be a table: write \[train\]"),
    ],
)
def test_wrong_keys_and_values(train, message):
    with pytest.raises(ConfigError, match=message):
        recipe_from_table({"train": train}, "my.toml")


def test_overrides_and_plan_json(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[train]\n"*" = { lr_scale = 2 }\nvision = { freeze = true }\n')
    overrides = ['train."layers.0.*".weight_decay=0.5', "train.vision.freeze=false", "train.*.lr_scale=3"]
    found = load_recipe(file, overrides).train
    assert found == {
        "*": PartConfig(lr_scale=3.0), "vision": PartConfig(freeze=False), "layers.0.*": PartConfig(weight_decay=0.5)
    }  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(plan_to_json(plan(replace(RECIPE, train=found))))
    assert recipe_from_json(path).train == found and list(recipe_from_json(path).train) == list(found)
    without = plan(replace(RECIPE, train={"*": PartConfig(lr_scale=3.0), "vision": PartConfig(freeze=True)}))
    assert changed_settings(without, path) == [
        "train.vision.freeze false -> true",
        'train.layers.0.* {"freeze": null, "lr_scale": null, "weight_decay": 0.5} -> (absent)',
    ]


def test_the_plan_says_what_trains():
    whole, part = plan(replace(RECIPE, train={})), plan(recipe(vision={"freeze": True}, layers_0={"freeze": True}))
    assert part.trained.trained["vision"] == 0 and part.trained.frozen["vision"] == part.parameters.vision
    assert part.trained.total + sum(part.trained.frozen.values()) == whole.trained.total == part.parameters.total
    assert part.trained.parts == tuple(part for part in OWN if part != "vision")
    lines = [line.split() for line in describe(part).splitlines()]
    assert ["vision", f"{part.parameters.vision / 1e3:.2f}", "k", "frozen"] in lines
    moving, still = part.trained.trained["attention"], part.trained.frozen["attention"]
    assert ["attention", f"{moving / 1e3:.2f}", "k", "trained,", f"{still / 1e3:.2f}", "k", "frozen"] in lines
    shown = describe(plan(recipe(router={"lr_scale": 0.5, "weight_decay": 0.25}, layers_0={"weight_decay": 0.0})))
    assert ", rate 0.0005, weight decay 0.25\n" in shown and ", weight decay 0 and the JSON's\n" in shown


def test_memory_counts_what_trains():
    frozen = {"vision": {"freeze": True}, "embedding": {"freeze": True}, "experts": {"freeze": True}}
    for stage in range(4):
        zero = {"zero_optimization": {"stage": stage}}
        whole, part = plan(replace(RECIPE, train={}), **zero), plan(recipe(**frozen), **zero)
        assert part.memory.weights == whole.memory.weights
        share = part.trained.total / whole.trained.total
        assert part.memory.gradients == pytest.approx(share * whole.memory.gradients)
        assert part.memory.optimizer == pytest.approx(share * whole.memory.optimizer)


def test_work_counts_what_trains():
    """By hand: a frozen encoder has no backward pass, frozen weights elsewhere no gradient of their own."""
    flops = plan(replace(RECIPE, train={})).flops
    encoder = plan(recipe(vision={"freeze": True})).flops
    both = plan(recipe(vision={"freeze": True}, connector={"freeze": True})).flops
    cell = 2 * (64 * 32 + 32 * 32 + 64 * 32) / 4
    assert both.training(0, 1, 0) == pytest.approx(flops.per_patch + cell)
    assert encoder.training(0, 1, 0) == pytest.approx(flops.per_patch + 2 * cell)
    experts = plan(recipe(experts={"freeze": True})).flops
    assert flops.training(1, 0, 0) - experts.training(1, 0, 0) == pytest.approx(2 * (2 * 2 * 3 * 16 * 32))
    output = plan(recipe(embedding={"freeze": True})).flops
    assert output.training(0, 0, 1) == pytest.approx(2 * flops.per_label)


def test_what_a_resumed_run_says():
    names = [name for name in rules(RECIPE) if part_of(name) not in ("router", "connector")]
    assert changed_parts(RECIPE, rules(RECIPE)) == ""
    assert changed_parts(recipe(embedding={"freeze": True}, router={"freeze": True}), names) == (
        "6 tensors of connector train, with fresh moments; 1 tensor of embedding are frozen"
    )


def test_a_part_that_the_model_lacks_is_not_counted():
    dense = replace(RECIPE, moe=replace(RECIPE.moe, first_dense_layers=3), train={})
    assert "experts" not in count_trained(dense).trained
    with pytest.raises(ConfigError, match=r"^train\.experts in my\.toml .*feed_forward, heads; a pattern"):
        plan(replace(dense, train={"experts": PartConfig(lr_scale=2.0)}))
