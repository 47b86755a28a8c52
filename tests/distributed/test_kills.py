"""A rank that is killed while it saves, at every kind of moment: what is loaded then is sound, and the run continues as
if nothing had been. Shards and folders that disappear."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import psutil
import pytest

from dsmoe_vl.checkpoint.store import newest_complete
from tests.support.runs import (
    CHECKPOINT_EVERY,
    REPOSITORY,
    TRAIN,
    curve,
    deepspeed_command,
    finish,
    metrics,
    python,
    start,
)  # fmt: skip

# Ends the process at a call of os.fsync, which follows every file of a checkpoint.
_SITE = """
import os, signal
if "KILL_AT" in os.environ:
    _sync, _calls = os.fsync, []
    def fsync(descriptor):
        _calls.append(descriptor)
        open(os.environ["CALLS"], "w").write(str(len(_calls)))
        if len(_calls) == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        _sync(descriptor)
    os.fsync = fsync
"""
PLAIN = ("run.samples_every=0", "run.evaluate_every=0")


@pytest.fixture(scope="module")
def counted(tiny, tmp_path_factory):
    """A run that is never killed, the number of os.fsync's calls, and the folder of the module that counts them."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "sitecustomize.py").write_text(_SITE)
    run = folder / "whole"
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", "KILL_AT": "0", "CALLS": str(folder / "calls")}
    result = finish(start(python(TRAIN, *tiny.arguments(run, *PLAIN)), **environment))
    assert result.status == 0, result.err
    return run, int((folder / "calls").read_text()), folder


@pytest.mark.parametrize("part", [0.4, 0.6, 0.9])
def test_a_kill_while_a_checkpoint_is_written(tiny, tmp_path, counted, part):
    """Of three checkpoints, in the second or third."""
    whole, calls, folder = counted
    run = tmp_path / "run"
    environment = {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", "CALLS": str(tmp_path / "calls")}
    environment["KILL_AT"] = str(int(part * calls))
    command = python(TRAIN, *tiny.arguments(run, *PLAIN))
    assert finish(start(command, **environment)).status == -signal.SIGKILL
    found = newest_complete(run / "checkpoints")
    assert found is not None
    result = finish(start(command))
    assert result.status == 0, result.err
    assert f"resumed at step {found[1].step}\n" in result.out
    assert curve(run) == curve(whole)


@pytest.fixture
def moved(tiny, tmp_path):
    """The tiny project on shards of its own: the folder of its data, and the command line."""
    data, recipe = tmp_path / "data", tmp_path / "tiny.toml"
    shutil.copytree(tiny.data, data)
    recipe.write_text(tiny.recipe.read_text().replace(str(tiny.data), str(data)))
    endless = ("run.steps=100000", *PLAIN)
    return data, ["--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--run-dir", tmp_path / "run", *endless]


def begun(command, run):
    """The process, once it has a checkpoint."""
    process, until = start(command), time.monotonic() + 120
    while newest_complete(run / "checkpoints") is None:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda data: data.rename(data.with_name("gone")), "shard cannot be read: {}/train-00000.tar: No such file"),
        (lambda data: cut(data), "shard changed while it was read: {}/train-00000.tar"),
    ],
    ids=["removed", "cut"],
)
def test_shards_that_disappear_or_change_end_the_run_with_their_name(moved, tmp_path, fault, message):
    data, arguments = moved
    process = begun(deepspeed_command(list(map(str, arguments))), tmp_path / "run")
    fault(data)
    result = finish(process)
    assert result.status == 2
    assert result.err.count("error (rank ") == 1 and "data.max_bad_fraction" in result.err
    assert any(message.format(data / name) in result.err for name in ("images_train", "videos_train")), result.err


def cut(data):
    for shard in data.glob("*_train/*.tar"):
        with shard.open("r+b") as file:
            file.truncate(5000)


def stop_between_saves(process, run):
    """Stop the process after a step whose next line of metrics comes before anything of a checkpoint is written."""
    process_itself, until = psutil.Process(process.pid), time.monotonic() + 120
    while True:
        process_itself.suspend()
        while process_itself.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        if 0 < metrics(run)[-1]["step"] - newest_complete(run / "checkpoints")[1].step < CHECKPOINT_EVERY:
            return
        process_itself.resume()
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def test_a_run_folder_that_disappears_is_told_and_made_again(moved, tmp_path):
    """Training is worth more than the folder: it goes on, and the next save makes it anew."""
    _, arguments = moved
    run, gone = tmp_path / "run", tmp_path / "gone"
    process = begun(python(TRAIN, *arguments), run)
    stop_between_saves(process, run)
    run.rename(gone)
    process.send_signal(signal.SIGCONT)
    until = time.monotonic() + 120
    while newest_complete(run / "checkpoints") is None or not (run / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.status == 0 and "metrics.jsonl cannot be written: No such file or directory" in result.out
    steps = [line["step"] for line in metrics(gone) + metrics(run)]
    assert steps == list(range(len(steps)))  # no line is lost
    found = newest_complete(run / "checkpoints")
    assert found is not None and found[1].step == steps[-1]
    assert json.loads((run / "plan.json").read_text())["recipe"]["run"]["steps"] == 100000
