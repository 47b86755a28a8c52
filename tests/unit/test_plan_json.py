"""plan.json of a run: the recipe comes back exactly, and changes since the last start are named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.plan import changed_settings, plan_to_json, recipe_from_json
from tests.unit.test_resolve import RECIPES, moe, plan


def test_plan_json_gives_the_recipe_back(tmp_path):
    path = tmp_path / "plan.json"
    for name in ("quickstart", "base", "large"):
        recipe = load_recipe(RECIPES / f"{name}.toml", ["moe.balance_weight=0.1", "model.rope_base=1"])
        found = plan(recipe)
        path.write_text(plan_to_json(found))
        assert recipe_from_json(path) == recipe
        stored = json.loads(path.read_text())
        assert stored["deepspeed"] == found.deepspeed
        assert stored["parameters"]["total"] == found.parameters.total
        assert stored["run_dir"] == f"runs/{name}"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"recipe": {"run": {"stpes": 1}}}', '{"recipe": 3}'])
def test_broken_plan_json_is_named(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.json"):
        recipe_from_json(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        recipe_from_json(tmp_path / "absent.json")


def test_changes_since_the_last_start_are_told(tmp_path):
    path, first = tmp_path / "plan.json", plan()
    assert changed_settings(first, path) == []
    path.write_text(plan_to_json(first))
    assert changed_settings(first, path) == []
    sources = (replace(first.recipe.data.sources[0], weight=9.0), *first.recipe.data.sources[1:])
    data, run = replace(first.recipe.data, sources=sources), replace(first.recipe.run, seed=2)
    recipe = replace(first.recipe, data=data, run=run)
    second = plan(recipe, moe() | {"gradient_clipping": 0.5})
    assert changed_settings(second, path) == [
        f"data.sources[0].weight {first.recipe.data.sources[0].weight} -> 9.0",
        "run.seed 1 -> 2",
        "gradient_clipping 1.0 -> 0.5",
    ]
    written = json.loads(path.read_text())
    del written["recipe"]["run"]["seed"]  # an older version's
    path.write_text(json.dumps(written))
    assert len(changed_settings(second, path)) == 2
    without = moe() | {"gradient_clipping": 0.5, "steps_per_print": 7}
    scheduler = without.pop("scheduler")
    told = changed_settings(plan(recipe, without), path)
    assert any(line.startswith("scheduler {") and line.endswith("-> (absent)") for line in told), told
    assert "steps_per_print (absent) -> 7" in told and scheduler["type"] in " ".join(told)
    for text in ("[]", "{", '{"recipe": 3}'):
        path.write_text(text)
        assert changed_settings(first, path) == []
