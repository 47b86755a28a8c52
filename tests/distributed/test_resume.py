"""A run that was interrupted, or lost its newest checkpoint, continues bit for bit as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest

from tests.distributed.ranks import run_ranks
from tests.runs import STEPS, TRAIN, curve, deepspeed_command, finish, metrics, start


def interrupt(command, run, number, after_step):
    """Start, signal the whole process group once a step is logged (as a terminal does), wait for the end."""
    process = start(command)
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and any(f'"step": {after_step},' in line for line in log.read_text().splitlines()):
            break
        time.sleep(0.02)
    os.killpg(process.pid, number)
    return finish(process)


def test_signals_end_with_a_checkpoint_and_the_same_command_continues(tiny, trained):
    """SIGTERM, then Ctrl-C, then to the end: the whole equals the run that was never interrupted."""
    run = tiny.folder / "runs" / "interrupted"
    command = deepspeed_command(tiny.arguments(run, "data.workers=1"))
    stopped_at = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        result = interrupt(command, run, number, after_step=stopped_at + 1)
        assert "the same command continues" in result.out, result.out + result.err
        assert "error" not in (result.out + result.err).lower(), result.out + result.err
        last = metrics(run)[-1]["step"]
        assert stopped_at < last < STEPS
        assert (run / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"
        stopped_at = last
    result = finish(start(command))
    assert result.status == 0 and f"resumed at step {stopped_at}" in result.out, result.out + result.err
    assert curve(run) == curve(trained)


def test_incomplete_checkpoints_are_passed_over(tiny, trained):
    run = tiny.folder / "runs" / "damaged"
    shutil.copytree(trained, run)
    newest, before, _ = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    (newest / "manifest.json").unlink()
    with (before / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    output = run_ranks(TRAIN, tiny.arguments(run), world_size=2)
    assert f"resumed at step {STEPS - 16}" in output
    assert curve(run) == curve(trained)
    steps = [json.loads((folder / "manifest.json").read_text())["step"] for folder in (newest, before)]
    assert steps == [STEPS, STEPS - 8]  # both were written anew


@pytest.mark.parametrize("stage", [3])
def test_resume_with_other_zero_stages(tiny, stage):
    run = tiny.folder / "runs" / f"zero{stage}"
    run_ranks(TRAIN, tiny.arguments(run, stage=stage), world_size=2)
    whole = curve(run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    assert f"resumed at step {STEPS - 8}" in run_ranks(TRAIN, tiny.arguments(run, stage=stage), world_size=2)
    assert curve(run) == whole
