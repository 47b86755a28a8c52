"""A process that stops is named, and every process of the job ends: SIGSTOP of a rank, or of a worker of its loader."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.ranks import free_port
from tests.support.runs import TRAIN, deepspeed_command, finish, impatient, python, start

ENDLESS = ("run.steps=100000", "run.evaluate_every=0", "run.checkpoint_every=100000", "run.stall_seconds=10")
BIN = Path(python()[0]).parent


def torchrun(arguments):
    return [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}", str(TRAIN), *arguments]


def ranks_of(started):
    """The processes of the ranks, by rank."""
    trains = [child for child in started if str(TRAIN) in child.cmdline() and child.name() != "pt_data_worker"]
    found = {child.environ().get("RANK"): child for child in trains}
    return [found["0"], found["1"]]


def workers_of(rank):
    return sorted((child for child in rank.children() if child.name() == "pt_data_worker"), key=lambda one: one.pid)


def stop_one(command, run, choose):
    """Start, stop one process once steps are logged, and wait for the end: the process id and what was printed.

    Fails if any process of the job is left.
    """
    process, log = start(command, **impatient(run.parent)), run / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    started = psutil.Process(process.pid).children(recursive=True)
    victim = choose(started)
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        result = finish(process, 150)
        _, left = psutil.wait_procs(started, timeout=10)
        assert not left
    finally:
        for one in started:
            if one.is_running():
                one.kill()
    assert result.status != 0
    assert result.err.count("no rank has made progress for ") == 1, result.err
    assert not re.search(r"rank \d failed:", result.err), result.err  # in a collective, because the others ended
    return victim.pid, result.err


@pytest.mark.parametrize(
    ("launcher", "rank", "silence"),
    [
        (deepspeed_command, 1, "run"),
        (deepspeed_command, 0, "answer"),  # it connects the ranks
        pytest.param(torchrun, 0, "run", marks=pytest.mark.long),  # whose own process connects them
    ],
)
def test_a_rank_that_is_stopped_is_named(tiny, tmp_path, launcher, rank, silence):
    run = tmp_path / "run"
    pid, printed = stop_one(
        launcher(tiny.arguments(run, *ENDLESS, "data.workers=1")), run, lambda started: ranks_of(started)[rank]
    )
    assert re.search(
        rf"error \(rank {1 - rank}\): .* for 1\d s: rank {rank} \(pid {pid} on .*\) does not {silence}: "
        r"a signal has stopped it; last heard in: .*",
        printed,
    ), printed
    stacks = run / f"stacks_0000{1 - rank}.txt"
    assert str(stacks) in printed and "trainer.py" in stacks.read_text()


def test_a_worker_that_is_stopped_is_named(tiny, tmp_path):
    run = tmp_path / "run"
    command = deepspeed_command(tiny.arguments(run, *ENDLESS, "data.workers=2"))
    pid, printed = stop_one(command, run, lambda started: workers_of(ranks_of(started)[1])[1])
    assert re.search(
        r"for 1\d s: rank 1 \(pid \d+ on .*\) is behind in: wait for data of step \d+; "
        rf"worker 1 of rank 1 \(pid {pid}\) has sent nothing for 1\d s: a signal has stopped it; "
        r"it was reading sample \d+ of \S+\.tar(, \S+)?\. The others are in: exchange of counts of step \d+\. ",
        printed,
    ), printed
    assert all(str(run / f"stacks_0000{rank}.txt") in printed for rank in (0, 1))
