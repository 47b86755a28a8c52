"""`launch/doctor.py` on the tiny recipe: the whole grid of `objective` with all three tasks, and a race of `lr`."""

from __future__ import annotations

import re

import pytest

from tests.support.runs import REPOSITORY, finish, python, start

DOCTOR = REPOSITORY / "launch" / "doctor.py"
THREE_TASKS = ("tasks.retrieval.weight=1", "tasks.retrieval.embedding_width=16", "tasks.summary.weight=1")


def test_the_grid_of_splits_agrees(tiny):
    command = python(DOCTOR, "objective", "--recipe", tiny.recipe, *THREE_TASKS, "tasks.retrieval.gradient_cache=true")
    result = finish(start(command), timeout_seconds=280)
    assert result.status == 0, result.out + result.err
    rows = [line.split() for line in result.out.splitlines() if line.endswith(tuple("0123456789"))]
    table = [row for row in rows if row[0] in ("1", "2") and len(row) >= 8]
    assert len(table) == 18 + 36
    assert "ok" in result.out and "no silent faults" in result.out
    assert "compared only for equal accumulation" not in result.out  # the gradient cache makes it unnecessary


def test_a_recipe_without_shards(tiny, tmp_path):
    result = finish(start(python(DOCTOR, "objective", "--recipe", tiny.recipe, f"tokenizer.path={tmp_path}/none")))
    assert result.status == 2
    assert result.err.count("error: ") == 1 and f"{tmp_path}/none" in result.err and "Traceback" not in result.err


def rows_of(out):
    """The cells of a race's table, by rate."""
    rows = [line.split() for line in out.splitlines() if line.startswith("  ") and line.split()[0][0].isdigit()]
    return {float(row[0]): row for row in rows if row[1][0].isdigit()}


def test_a_race_of_two_rates(tiny):
    rates = ("--rates", "1e-2,1e9", "--steps", "10", "--world-size", "2")
    tasks = ("tasks.retrieval.weight=1", "tasks.retrieval.embedding_width=16")
    command = python(DOCTOR, "lr", "--recipe", tiny.recipe, "--deepspeed", tiny.deepspeed(2), *tasks, *rates)
    result = finish(start(command))
    assert result.status == 0, result.out + result.err
    assert "held-out     caption   retrieval   grad norm" in result.out
    rows = rows_of(result.out)
    assert set(rows) == {1e-2, 1e9}
    good, bad = rows[1e-2], rows[1e9]
    assert all(0 < float(cell) < 20 for cell in good[1:5]) and " ".join(good[6:]) == "the JSON's"
    assert float(good[2]) == pytest.approx(float(good[3]) + float(good[4]), abs=2e-4)
    assert "diverged at step" in " ".join(bad)
    assert "suggested: optimizer.params.lr = 0.01 in" in result.out
    assert "0.01 is the lowest rate of the race" in result.out


def test_a_race_that_no_rate_survives(tiny):
    rates = ("--rates", "1e9,1e10", "--steps", "10")
    command = python(
        DOCTOR, "lr", "--recipe", tiny.recipe, "--deepspeed", tiny.deepspeed(2), "data.evaluation=[]", *rates
    )
    result = finish(start(command))
    assert result.status == 1, result.out + result.err
    assert "no held-out packs" in result.out and "every rate diverged" in result.out
    assert "optimizer.params.lr =" not in result.out and "--rates 1e+06,1e+07,1e+08" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rates=-1,1e-3",), "--rates -1.0"),
        (("--rates", "1e-3"), "at least two"),
        (("--steps", "3"), "--steps 3"),
    ],
)
def test_a_race_that_cannot_be_run(tiny, arguments, words):
    result = finish(start(python(DOCTOR, "lr", "--recipe", tiny.recipe, *arguments)))
    assert result.status == 2 and words in result.err and "Traceback" not in result.err


def gradients_of(out):
    """Task by task: loss, norm, cosines."""
    rows = [line.split() for line in out.splitlines()]
    return {
        row[0]: [float(cell) for cell in row[1:]]
        for row in rows
        if row and row[0] in ("caption", "retrieval", "summary")
    }


def test_suggested_weights_even_out_the_gradients(tiny):
    command = python(DOCTOR, "weights", "--recipe", tiny.recipe, "--deepspeed", tiny.deepspeed(2), "--steps", "0")
    first = finish(start([*command, *THREE_TASKS]))
    assert first.status == 0, first.out + first.err
    before = gradients_of(first.out)
    assert set(before) == {"caption", "retrieval", "summary"} and all(loss > 0 for loss, *_ in before.values())
    assert [row[2 + index] for index, row in enumerate(before.values())] == [1.0, 1.0, 1.0]
    suggested = re.findall(r"^  (tasks\.\w+\.\w+) = (\S+)   # now 1$", first.out, re.MULTILINE)
    assert len(suggested) == 5  # of every term
    second = finish(start([*command, *THREE_TASKS[1:2], *(f"{key}={value}" for key, value in suggested)]))
    assert second.status == 0, second.out + second.err
    after = gradients_of(second.out)
    norms = [row[1] for row in after.values()]
    assert max(norms) < 1.01 * min(norms) < 1.01 * max(norms)  # suggestions have three digits
    assert [row[2:] for row in after.values()] == [row[2:] for row in before.values()]


def test_weights_of_one_task(tiny):
    result = finish(start(python(DOCTOR, "weights", "--recipe", tiny.recipe)))
    assert result.status == 2 and "learns caption: weights are of at least two tasks" in result.err
    assert "Traceback" not in result.err
