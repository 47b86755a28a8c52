"""A run that was interrupted, or lost its newest checkpoint, continues bit for bit as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.support.runs import SHOWS_SAMPLES, STEPS, TRAIN, curve, deepspeed_command, finish, impatient, metrics, start


def interrupt(command, run, number, after_step, send=os.killpg):
    """Start, signal the whole process group once a step is logged (as a terminal does), wait for the end."""
    process = start(command)
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and any(f'"step": {after_step},' in line for line in log.read_text().splitlines()):
            break
        time.sleep(0.02)
    send(process.pid, number)
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: ranks without a launcher were not checked")
def test_ranks_end_with_the_command_that_started_them(tiny):
    """A signal to `deepspeed` alone ends that process at once, and nothing tells its ranks."""
    run = tiny.folder / "runs" / "orphaned"
    result = interrupt(
        deepspeed_command(tiny.arguments(run, "run.steps=100000")), run, signal.SIGTERM, after_step=2, send=os.kill
    )
    assert result.status == -signal.SIGTERM
    assert "the same command continues" in result.out, result.out + result.err
    last = metrics(run)[-1]["step"]
    assert last >= 2 and (run / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: ranks without a launcher were not checked")
def test_ranks_end_with_a_command_that_is_killed_while_they_start(tiny):
    run = tiny.folder / "runs" / "stillborn"
    process, deadline = start(deepspeed_command(tiny.arguments(run))), time.monotonic() + 120
    while not run.exists() and time.monotonic() < deadline:  # the ranks have met; there is no model yet
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert "stopped at step 1 of" in finish(process).out


def test_a_taken_port_is_named(tiny, tmp_path):
    command = deepspeed_command(tiny.arguments(tiny.folder / "runs" / "second"))
    port = command[command.index("--master_port") + 1]
    with socket.create_server(("", int(port))):
        result = finish(start(command, **impatient(tmp_path)))
    assert result.status == 2
    assert f"error (rank 0): port {port} of the first host is in use" in result.err
    assert "Traceback" not in result.out + result.err


def test_incomplete_checkpoints_are_passed_over(tiny, trained):
    run = tiny.folder / "runs" / "damaged"
    shutil.copytree(trained, run)
    newest, before, _ = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    (newest / "manifest.json").unlink()
    with (before / "model-00002-of-00002.safetensors").open("r+b") as file:
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


@pytest.mark.parametrize("stage", [2, 3])
def test_a_finished_run_has_nothing_to_train_on_any_topology(tiny, trained, stage):
    """So the plain command works after the quickstart, which trains on two ranks."""
    before = {path: path.read_bytes() for path in trained.rglob("*.json")}
    output = run_ranks(TRAIN, tiny.arguments(trained, SHOWS_SAMPLES, stage=stage), world_size=1)
    assert f"trained to step {STEPS} of {STEPS} already: raise run.steps" in output
    assert {path: path.read_bytes() for path in trained.rglob("*.json")} == before
