"""TOML recipes: strict keys and types, overrides, and messages that name the place and the fix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_vl.config.load import load_recipe, recipe_from_table
from dsmoe_vl.config.recipe import PartConfig, Recipe, SourceConfig, StageConfig
from dsmoe_vl.errors import ConfigError
from tests.support.shipped import RECIPES, shipped


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_empty_recipe_is_the_defaults(tmp_path):
    assert load_recipe(written(tmp_path, "")) == Recipe()


def test_every_kind_of_value(tmp_path):
    recipe = load_recipe(
        written(
            tmp_path,
            """
            [model]
            rope_base = 500
            [model.vision]
            width = 64
            [[data.sources]]
            name = "a"
            path = "shards/a"
            [[data.sources]]
            name = "b"
            path = "shards/b"
            weight = 2
            """,
        )
    )
    assert recipe.model.rope_base == 500.0 and type(recipe.model.rope_base) is float
    assert recipe.model.vision.width == 64
    assert recipe.data.sources == (SourceConfig("a", "shards/a"), SourceConfig("b", "shards/b", 2.0))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    recipe = shipped(path)
    assert recipe.run.name == path.stem
    assert recipe.data.sources and recipe.data.evaluation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model]\nwidht = 3", ["model.widht", "recipe.toml", 'Did you mean "model.width"?']),
        ("[modle]\nwidth = 3", ["modle", 'Did you mean "model"?']),
        ("[model]\nvocab_size = 3", ["model.vocab_size", '"tokenizer.vocab_size"']),
        ("[run]\ntrain_batch_size = 3", ["run.train_batch_size", "DeepSpeed JSON"]),
        ("[optimizer]\nlr = 3", ["optimizer", "DeepSpeed JSON"]),
        ("[run]\nxyzzy = 3", ["run.xyzzy", "Valid here", "run.steps"]),
        ("[[data.sources]]\npaht = 'x'", ["data.sources[0].paht", '"data.sources[0].path"']),
        ("[data]\nsources = 3", ["data.sources", "[[data.sources]]"]),
        ("[data.sources]\nname = 'x'", ["data.sources", "[[data.sources]]"]),
        ("[run]\nsteps = 1.5", ["run.steps", "1.5", "a whole number"]),
        ("[run]\nsteps = true", ["run.steps", "true", "a whole number"]),
        ("[moe]\nbalance_weight = true", ["moe.balance_weight", "a number"]),
        ("[moe]\nbalance_weight = nan", ["moe.balance_weight", "a number"]),
        ("[moe]\nbalance_weight = '0.1'", ["moe.balance_weight", "'0.1'", "a number"]),
        ("[run]\nname = 7", ["run.name", "a string in quotes"]),
        ("model = 7", ["model", "[model]"]),
        ("[run\nsteps = 1", ["recipe.toml", "not valid TOML", "line 1"]),
        ("[run]\nsteps = 1\nsteps = 2", ["recipe.toml", "not valid TOML"]),
    ],
)
def test_bad_recipe_is_named(tmp_path, text, expected):
    with pytest.raises(ConfigError) as raised:
        load_recipe(written(tmp_path, text))
    for part in expected:
        assert part in str(raised.value)


def test_missing_file_names_the_shipped_recipes(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml does not exist.*base\.toml.*quickstart\.toml"):
        load_recipe(tmp_path / "absent.toml")


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(tmp_path / "binary.toml")


def test_overrides_win_in_order(tmp_path):
    path = written(tmp_path, "[run]\nsteps = 5\nname = 'file'")
    overrides = [
        "run.steps=7",
        "run.name = second ",
        "run.steps=8",
        "model.vision.layers=2",
        "moe.balance_weight=0",
        'data.sources=[{name="a", path="b"}]',
        'tokenizer.path="some file"',
        "stages=[{steps = 8}]",
        "train.experts.lr_scale=3",
        'train={"*" = {lr_scale = 2}}',
    ]
    recipe = load_recipe(path, overrides)
    expected = replace(recipe.run, steps=8, name="second")
    assert recipe.run == expected
    assert recipe.model.vision.layers == 2
    assert recipe.moe.balance_weight == 0.0
    assert recipe.data.sources == (SourceConfig("a", "b"),)
    assert recipe.tokenizer.path == "some file"
    assert recipe.stages == (StageConfig(8),)
    assert recipe.train == {"*": PartConfig(lr_scale=2.0)}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps", "section.key=value"),
        ("steps=5", "section.key=value"),
        ("=5", "section.key=value"),
        ("run..steps=5", "section.key=value"),
        ("run.stpes=5", '"run.steps"'),
        ("run.steps=abc", "a whole number"),
        ("run.steps=", "no valid TOML value"),
        ('run.name="open', "no valid TOML value"),
        ("run.name=12", "a string in quotes"),
        ("data.sources.weight=2", "sources is not a table"),
        ("run.steps.more=2", "steps is not a table"),
        ("model.vision=3", "must be a table"),
        ("optimizer.params.lr=1e-3", "DeepSpeed JSON"),
        ("run.steps=1\nrun.seed=2", "a whole number"),
    ],
)
def test_bad_override_is_named(tmp_path, override, expected):
    path = written(tmp_path, "[run]\nsteps = 5\n[[data.sources]]\nname = 'a'\npath = 'b'")
    with pytest.raises(ConfigError) as raised:
        load_recipe(path, [override])
    assert repr(override) in str(raised.value) and expected in str(raised.value)


def test_recipe_from_table_does_not_change_its_input():
    table = {"run": {"steps": 3}, "data": {"sources": [{"name": "a", "path": "b"}]}}
    assert recipe_from_table(table, "here").run.steps == 3
    assert table == {"run": {"steps": 3}, "data": {"sources": [{"name": "a", "path": "b"}]}}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "x.toml").write_text(
        '[[data.sources]]\nname = "a"\npath = "~/shards"\n[[data.evaluation]]\nname = "b"\npath = "pipe:cat ~/x"\n'
        '[tokenizer]\npath = "~/t.model"\n'
    )
    recipe = load_recipe(tmp_path / "x.toml", ["run.directory=~/runs", "run.name=~"])
    assert recipe.data.sources[0].path == "/home/somebody/shards"
    assert recipe.data.evaluation[0].path == "pipe:cat ~/x"  # the shell's own
    assert recipe.tokenizer.path == "/home/somebody/t.model"
    assert (recipe.run.directory, recipe.run.name) == ("/home/somebody/runs", "~")
