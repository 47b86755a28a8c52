"""One rank's fault in a save at ZeRO-3, whose ranks put weights together while they write: nobody waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsmoe_vl.checkpoint.store import newest_complete
from tests.support.runs import curve, two_ranks

SCRIPT = Path(__file__).with_name("train_with_fault.py")
PLAIN = ("run.samples_every=0", "run.evaluate_every=0", "run.steps=12", "run.checkpoint_every=4")


def train(tiny, run, fault=""):
    """What a run of two ranks came to, with a fault of rank 1."""
    arguments = tiny.arguments(run, *PLAIN, stage=3)
    return two_ranks(arguments, script=SCRIPT, FAULT=fault) if fault else two_ranks(arguments)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run without a fault."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = train(tiny, run)
    assert result.status == 0, result.err
    return run


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("memory", "no copy could be made in memory (DefaultCPUAllocator: can't allocate memory)"),
        ("disk", "No space left on device"),
    ],
)
def test_a_save_that_fails_on_one_rank_is_told_and_training_goes_on(tiny, tmp_path, whole, fault, message):
    run = tmp_path / "run"
    result = train(tiny, run, fault)
    assert result.status == 0, result.out + result.err
    warnings = [line for line in result.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and message in warnings[0] and "training goes on" in warnings[0], result.out
    assert sorted(path.name for path in run.glob("checkpoints/step_*")) == ["step_00000008", "step_00000012"]
    assert curve(run) == curve(whole)


def test_a_rank_that_is_killed_while_weights_are_put_together(tiny, tmp_path, whole):
    run = tmp_path / "run"
    result = train(tiny, run, "kill")
    assert result.status != 0
    assert newest_complete(run / "checkpoints") is None
    result = train(tiny, run)
    assert result.status == 0, result.err
    assert curve(run) == curve(whole)
