"""Ends that may not lose work: output without a reader, a closed terminal, a signal while a run starts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from dsmoe_vl.checkpoint.store import newest_complete
from tests.distributed.ranks import cpu_environment, free_port
from tests.support.runs import REPOSITORY, TRAIN, deepspeed_command, finish, metrics, python, start
from tests.support.warm import popen

LONG = ("run.steps=100000", "run.evaluate_every=0", "run.checkpoint_every=100000")
SECONDS = 150.0
BIN = Path(python()[0]).parent


def launched(launcher, arguments):
    """The command of one or two ranks."""
    if launcher == "alone":
        return python(TRAIN, *arguments)
    if launcher == "torchrun":
        return [
            str(BIN / "torchrun"),
            "--nproc_per_node",
            "2",
            "--master_port",
            str(free_port()),
            str(TRAIN),
            *arguments,
        ]
    return deepspeed_command(arguments)


def wait_for(condition, process, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.args
        time.sleep(0.05)


def steps_of(run):
    """Steps in the log so far."""
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


def family(process):
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def assert_saved(run, processes, seconds=SECONDS):
    """All have ended, and the last step that was logged is saved."""
    _, alive = psutil.wait_procs(processes, seconds)
    for process in alive:
        process.kill()
    assert not alive
    found = newest_complete(run / "checkpoints")
    assert found is not None and found[1].step == metrics(run)[-1]["step"] >= 2


@pytest.mark.parametrize("launcher", ["alone", "deepspeed", pytest.param("torchrun", marks=pytest.mark.long)])
def test_a_reader_that_goes_away_stops_a_run_that_saves(tiny, tmp_path, launcher):
    """As `| head -1` does, and the end of pdsh over hosts."""
    run, errors = tmp_path / "run", tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            launched(launcher, tiny.arguments(run, *LONG)),
            stdout=subprocess.PIPE, stderr=file, cwd=REPOSITORY, env=cpu_environment(), start_new_session=True,
        )  # fmt: skip
    wait_for(lambda: steps_of(run) >= 2, process)
    ranks = family(process)
    process.stdout.close()
    assert_saved(run, ranks)
    if launcher != "deepspeed":  # whose own log is in the same pipe
        assert process.wait() == 0 and "Traceback" not in errors.read_text()


@pytest.mark.parametrize("launcher", ["alone", "deepspeed"])
def test_a_closed_terminal_stops_a_run_that_saves(tiny, tmp_path, launcher):
    """The system sends SIGHUP to all processes of a terminal."""
    run = tmp_path / "run"
    process = start(launched(launcher, tiny.arguments(run, *LONG, "data.workers=1")))
    wait_for(lambda: steps_of(run) >= 2, process)
    ranks = family(process)
    os.killpg(process.pid, signal.SIGHUP)
    result = finish(process, SECONDS)
    assert_saved(run, ranks)
    assert launcher == "deepspeed" or (result.status == 0 and "stopped at step" in result.out)


def test_nohup_keeps_a_run_alive(tiny, tmp_path):
    run = tmp_path / "run"
    command = ["nohup", *python(TRAIN, *tiny.arguments(run, "run.steps=12", "run.evaluate_every=0"))]
    process = start(command)
    wait_for(lambda: steps_of(run) >= 2, process)
    os.killpg(process.pid, signal.SIGHUP)
    assert finish(process, SECONDS).status == 0
    assert metrics(run)[-1]["step"] == 12


@pytest.mark.parametrize("launcher", ["alone", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long), signal.SIGINT])
def test_a_signal_while_a_run_starts(tiny, tmp_path, launcher, number):
    """The run takes a step, saves it and ends, as at any later time."""
    run = tmp_path / "run"
    command = launched(launcher, tiny.arguments(run, "run.steps=100000"))
    process = start(command, cold=True)
    wait_for(lambda: (run / "lock").exists(), process)
    ranks = [child for child in family(process) if "train.py" in " ".join(child.cmdline()) and child.ppid() != 1]
    os.kill(ranks[-1].pid, number)  # one rank alone
    result = finish(process, SECONDS)
    assert result.status == 0, result.out + result.err
    assert "stopped at step 1 of 100000; the same command continues from here" in result.out
    found = newest_complete(run / "checkpoints")
    assert found is not None and found[1].step == 1


def test_a_full_disk_under_the_output_does_not_stop_a_run(tiny, tmp_path):
    run = tmp_path / "run"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            python(TRAIN, *tiny.arguments(run, "run.steps=6", "run.evaluate_every=0")),
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=cpu_environment(), timeout=SECONDS,
        )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert metrics(run)[-1]["step"] == 6


@pytest.mark.parametrize(
    "make",
    [
        lambda tiny, run, new: ["launch/evaluate.py", "--run", run, "--limit", 2],
        lambda tiny, run, new: ["launch/generate.py", "caption", "--run", run, "--media", tiny.data / "images_eval"],
        lambda tiny, run, new: ["launch/export.py", "--run", run, "--output", new],
        lambda tiny, run, new: ["-m", "data_tools.inspect", tiny.data / "images_eval"],
        lambda tiny, run, new: [TRAIN, "--dry-run", *tiny.arguments(new)],
    ],
    ids=["evaluate", "generate", "export", "inspect", "dry run"],
)
@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_a_program_whose_output_cannot_be_written_ends_quietly(tiny, trained, tmp_path, make, output):
    reader, writer = os.pipe()
    os.close(reader)
    if output == "full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    process = popen(
        python(*make(tiny, trained, tmp_path / "new")),
        stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=cpu_environment(), start_new_session=True,
    )  # fmt: skip
    os.close(writer)
    done = finish(process, SECONDS)
    assert (done.status, done.err) == (0, "")
