"""Stages of one run, as a user starts them: what trains when, and that an interruption anywhere changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsmoe_vl.checkpoint.optimizer_files import OptimizerFiles
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from tests.distributed.ranks import run_ranks
from tests.support.runs import STEPS, TRAIN, curve, metrics

FIRST = 10  # steps of the first stage
_STAGES = f"""
[[stages]]
steps = {FIRST}
lr_scale = 0.5

[stages.train]
"*" = {{ freeze = true }}
connector = {{ freeze = false }}

[[stages]]
steps = {STEPS - FIRST}
train.vision = {{ lr_scale = 0.5 }}
"""


def arguments(tiny, run, stage):
    recipe = run.parent / "staged.toml"
    recipe.write_text(tiny.recipe.read_text() + _STAGES)
    options = tiny.arguments(run, "run.keep_checkpoints=9", stage=stage)
    return [str(recipe) if word == str(tiny.recipe) else word for word in options]


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def parts_that_moved(run: Path, first: int, second: int) -> set[str]:
    before, after = (WeightsFile(step_folder(run, step)).load() for step in (first, second))
    return {name.partition(".")[0] for name in before if not before[name].equal(after[name])} - {"head"}


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_connector_first_then_everything(tiny, tmp_path, stage):
    run = tmp_path / "run"
    command = arguments(tiny, run, stage)
    output = run_ranks(TRAIN, command, world_size=2)
    assert f"stage 1 of 2 ends at step {FIRST}; it trains connector\n" in output
    assert f"note: since step_{FIRST:08d}, " in output and "train, with fresh moments" in output
    assert f"stage 2 of 2 ends at step {STEPS}; it trains vision, connector, embedding, " in output
    assert parts_that_moved(run, 8, FIRST) == {"connector"}
    assert parts_that_moved(run, FIRST, 16) == {"connector", "embedding", "layers", "norm", "vision"}
    updates = OptimizerFiles(step_folder(run, STEPS)).updates
    assert updates["connector.up.weight"] == STEPS and updates["vision.norm.weight"] == STEPS - FIRST

    rates = {line["step"]: line["lr"] for line in metrics(run) if "lr" in line}
    assert max(rates[step] for step in range(1, FIRST + 1)) == pytest.approx(5e-3)
    assert max(rates[step] for step in range(FIRST + 1, STEPS + 1)) == pytest.approx(1e-2)
    assert rates[FIRST + 1] == pytest.approx(2 * rates[1]) and rates[FIRST + 3] == pytest.approx(2 * rates[3])

    whole = curve(run)
    for step in (FIRST, 8) if stage == 2 else (16,):  # between the stages, in the first, in the second
        for later in sorted((run / "checkpoints").glob("step_*")):
            if int(later.name[5:]) > step:
                shutil.rmtree(later)
        assert f"resumed at step {step}" in run_ranks(TRAIN, command, world_size=2)
        assert curve(run) == whole
