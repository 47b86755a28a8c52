"""A learning rate that destroys the weights ends every rank with an error, and leaves the checkpoints alone."""

from __future__ import annotations

import json

import pytest

from tests.distributed.ranks import try_ranks
from tests.support.runs import TRAIN, curve, finish, metrics, python, start


@pytest.fixture
def with_rate(tiny, tmp_path):
    """The arguments of a run with another learning rate and ZeRO stage."""

    def arguments(rate, *more, stage=2):
        config = json.loads(tiny.deepspeed().read_text())
        config["optimizer"]["params"]["lr"] = rate
        config["zero_optimization"]["stage"] = stage
        file = tmp_path / f"{rate}.json"
        file.write_text(json.dumps(config))
        run = ["--recipe", str(tiny.recipe), "--run-dir", str(tmp_path / "run"), "data.evaluation=[]"]
        return ["--deepspeed", str(file), *run, *more]

    return arguments


def checkpoints(tmp_path):
    return sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_rate_of_1e9_ends_all_ranks_and_keeps_the_checkpoint(with_rate, tmp_path, stage):
    good = try_ranks(TRAIN, with_rate(1e-2, "run.steps=4", "run.keep_checkpoints=1", stage=stage), 2)
    assert [rank.status for rank in good] == [0, 0], good[0].err + good[1].err
    first = curve(tmp_path / "run")
    bad = with_rate(
        1e9, "run.steps=40", "run.keep_checkpoints=1", "run.max_skipped_steps=5", "run.checkpoint_every=5", stage=stage
    )
    ended = try_ranks(TRAIN, bad, 2)
    errors = ended[0].err + ended[1].err
    assert [rank.status for rank in ended] == [2, 2], errors
    assert errors.count("error (rank") == 1 and "Traceback" not in errors
    lines = metrics(tmp_path / "run")
    last = lines[-1]["step"]
    assert (
        f"step {last} was skipped as the 5th in a row (run.max_skipped_steps = 5), data sources images, vid" in errors
    )
    assert "optimizer.params.lr" in errors and "is of step 5" in errors
    assert f"step {last} skipped, 5 in a row" in ended[0].out and "OVERFLOW" not in ended[0].err
    assert curve(tmp_path / "run")[:4] == first
    assert [line["skipped_steps"] for line in lines[-6:]] == [0, 1, 1, 1, 1, 1]
    # That of step 5 was written with huge but finite weights; no step from it has worked, so the older one is kept.
    assert checkpoints(tmp_path) == ["step_00000004", "step_00000005"]


@pytest.mark.parametrize(
    ("rate", "steps", "words"),
    [
        (1e9, 5, "step 5 was skipped as the 2nd in a row (run.max_skipped_steps = 10)"),  # the last one
        (1e39, 3, "step 3 is not saved: "),  # infinite weights, before any loss could show it
    ],
)
def test_a_short_run_saves_no_broken_weights(with_rate, tmp_path, rate, steps, words):
    ended = finish(start(python(TRAIN, *with_rate(rate, f"run.steps={steps}"))))
    assert ended.status == 2 and words in ended.err, ended.out + ended.err
    assert checkpoints(tmp_path) == []
