"""[lora]: which parameters train, what the plan says of them, and settings without a sense."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsmoe_vl.config.load import recipe_from_table
from dsmoe_vl.config.parts import is_adapter, part_of
from dsmoe_vl.config.recipe import LoraConfig, PartConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.trained import rules
from tests.distributed.train_losses import RECIPE
from tests.unit.test_what_trains import plan

LORA = LoraConfig(rank=4)
FREEZE, THAW = PartConfig(freeze=True), PartConfig(freeze=False)


def adapted(lora=LORA, **train):
    return replace(RECIPE, lora=lora, train={key.replace("everything", "*"): table for key, table in train.items()})


def moving(recipe):
    return {name for name, rule in rules(recipe).items() if not rule.freeze}


def test_what_it_adapts_is_frozen_before_the_tables_of_train():
    names = list(rules(adapted()))
    adapters = {name for name in names if is_adapter(name)}
    attention, connector = ({name for name in names if part_of(name) == part} for part in ("attention", "connector"))
    others = {name for name in names if part_of(name) not in LORA.parts}
    assert {part_of(name) for name in adapters} == set(LORA.parts)
    assert moving(adapted()) == adapters | others
    assert moving(adapted(attention=THAW)) == adapters | others | attention
    first = adapted(everything=FREEZE, connector=THAW)  # as a first stage has it
    assert moving(first) == connector
    assert moving(replace(first, train={**first.train, "*lora*": THAW})) == connector | adapters
    rates = rules(adapted(experts=PartConfig(lr_scale=3.0)))
    assert {rates[name].lr_scale for name in adapters if "experts" in name} == {3.0}


def test_rank_0_is_the_model_without():
    assert rules(replace(RECIPE, lora=LoraConfig(rank=0, alpha=3.0))) == rules(RECIPE)


def test_the_plan_says_what_trains():
    found = plan(adapted())
    lines = [line.split() for line in describe(found).splitlines()]
    expected = f"{found.trained.trained['experts'] / 1e3:.2f} k trained, {found.trained.frozen['experts'] / 1e3:.2f} k"
    assert ["experts", *expected.split(), "frozen"] in lines
    assert any(line[:3] == ["of", "these", "adapters"] and "rank 4, alpha 16, in" in " ".join(line) for line in lines)
    assert found.memory.optimizer == 8 * found.trained.total < 8 * found.parameters.total


WRONG = [
    ({"rank": -1}, r"^lora\.rank = -1 in my\.toml: must not be negative"),
    ({"rank": 4, "alpha": 0}, r"^lora\.alpha = 0\.0 in my\.toml: must be above 0"),
    ({"rank": 4, "parts": ["router"]}, r"^lora\.parts = \('router',\) in my\.toml: adapters exist for vision, "
     r"attention, feed_forward, experts"),
    ({"rank": 4, "parts": ["attention"] * 2}, r"^lora\.parts = .* in my\.toml: names a part twice"),
    ({"rank": 4, "parts": []}, r"^lora\.parts = \(\) in my\.toml: names no part"),
    ({"rank": 17, "parts": ["experts"]}, r"^lora\.rank = 17 in my\.toml is above 16, the rank that "
     r'layers\.1\.feed_forward\.experts\.w1 has at most: set lora\.rank to 16 or less, or leave "experts" out'),
]  # fmt: skip


@pytest.mark.parametrize(("lora", "message"), WRONG)
def test_settings_without_a_sense(lora, message):
    with pytest.raises(ConfigError, match=message):
        plan(adapted(recipe_from_table({"lora": lora}, "my.toml").lora))


def test_a_part_without_a_matrix():
    dense = replace(adapted(), moe=replace(RECIPE.moe, first_dense_layers=3))
    with pytest.raises(ConfigError, match=r'^lora\.parts in my\.toml names "experts", but nothing of it'):
        plan(dense)


def test_a_table_about_what_is_frozen_is_told_why():
    recipe = replace(adapted(), train={"layers.0.attention_norm.*": PartConfig(lr_scale=2.0)})
    with pytest.raises(ConfigError, match=r"has no effect, .* freeze less \(\[lora\] freezes what it adapts\)"):
        plan(recipe)
