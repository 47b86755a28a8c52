"""`launch/doctor.py objective` on the tiny recipe with all three tasks: the whole grid, and what it says."""

from __future__ import annotations

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
