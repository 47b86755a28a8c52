"""Ranks that end are started again: `--max-restarts` under every launcher, and what is not started again."""

from __future__ import annotations

import os
import re
import signal
import time

import psutil
import pytest

from dsmoe_vl.checkpoint.store import newest_complete
from tests.distributed.ranks import free_port
from tests.distributed.test_launchers import BIN, mpirun
from tests.support.runs import REPOSITORY, TRAIN, curve, deepspeed_command, finish, metrics, python, start

KEPT = ("run.samples_every=0",)


def wait_for(condition, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def steps_of(run):
    return metrics(run)[-1]["step"] if (run / "metrics.jsonl").exists() and metrics(run) else 0


def has_checkpoint(run):
    """The one of step 8 is complete at step 16 at the latest, when the next one begins; the run has 24."""
    return (run / "checkpoints").exists() and newest_complete(run / "checkpoints") is not None


def ranks_of(processes, supervised=True):
    """The processes that train, by rank: the children of the supervisors."""
    found = [one for process in processes for one in psutil.Process(process.pid).children(recursive=True)]
    trains = [one for one in found if str(TRAIN) in one.cmdline() and one.name() != "pt_data_worker"]
    return {
        one.environ()["RANK"]: one for one in trains if ("DSMOE_VL_SUPERVISOR" in one.environ()) == supervised
    }  # fmt: skip


def by_deepspeed(*arguments):
    return start(deepspeed_command([*arguments, "--max-restarts", "1"]))


def by_mpirun(*arguments):
    port = free_port()
    return start(mpirun(port, *arguments, "--max-restarts", "1"), MASTER_PORT=str(port))


def by_torchrun(*arguments):
    options = ("--nproc_per_node=2", f"--master_port={free_port()}")
    return start([str(BIN / "torchrun"), *options, str(TRAIN), *arguments, "--max-restarts", "1"])


def by_torchrun_itself(*arguments):
    options = ("--nproc_per_node=2", f"--master_port={free_port()}", "--max-restarts=1")
    return start([str(BIN / "torchrun"), *options, str(TRAIN), *arguments])


def two_processes(*arguments):
    """Without a launcher, as a cluster that starts one container a rank."""
    common = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = python(TRAIN, *arguments, "--max-restarts", "1")
    return [start(command, cold=True, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]


@pytest.mark.parametrize(
    "launch",
    [by_deepspeed, *(pytest.param(launch, marks=pytest.mark.long) for launch in (by_torchrun, by_torchrun_itself))],
)
def test_a_killed_rank_starts_again_and_nothing_differs(launch, tiny, trained, tmp_path):
    run = tmp_path / "run"
    process = launch(*tiny.arguments(run, *KEPT))
    wait_for(lambda: has_checkpoint(run), process)
    ranks_of([process], supervised=launch is not by_torchrun_itself)["1"].kill()
    result = finish(process, 200)
    assert result.status == 0, result.out + result.err
    assert curve(run) == curve(trained)
    assert re.search(r"resumed at step (8|16)\n", result.out)  # steps go on until the signal arrives
    if launch is not by_torchrun_itself:
        told = r"rank 0: restart 1 of 1 since step (8|16): rank 1 on .* was ended by SIGKILL; 2 ranks start again"
        assert re.search(told, result.out)


def test_a_rank_that_stops_is_named_and_started_again(tiny, trained, tmp_path):
    run = tmp_path / "run"
    process = by_mpirun(*tiny.arguments(run, *KEPT, "run.stall_seconds=10"))
    wait_for(lambda: has_checkpoint(run), process)
    ranks_of([process])["1"].suspend()
    result = finish(process, 200)
    assert result.status == 0, result.out + result.err
    assert "no rank has made progress for " in result.err and "a signal has stopped it" in result.err
    # The other rank's watchdog ends it, and then itself.
    told = r"restart 1 of 1 since step (8|16): rank (1 on .* was ended by SIGKILL|0 on .* ended with status)"
    assert re.search(told, result.out)
    assert curve(run) == curve(trained)


def test_the_ranks_that_are_left_go_on(tiny, tmp_path):
    run = tmp_path / "run"
    first, second = two_processes(*tiny.arguments(run, *KEPT))
    wait_for(lambda: has_checkpoint(run), first)
    rank = ranks_of([second])["1"]
    second.kill()
    assert not psutil.wait_procs([rank], 10)[1]  # it ends with its supervisor
    second.communicate()
    result = finish(first, 200)
    assert result.status == 0, result.out + result.err
    assert "; 1 of 2 ranks start again" in result.out and "it is read into 1 rank" in result.out
    assert metrics(run)[-1]["step"] == 24


def test_a_crash_loop_ends_with_its_reason(tiny, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if 'DSMOE_VL_SUPERVISOR' in os.environ and os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = deepspeed_command([*tiny.arguments(tmp_path / "run"), "--max-restarts", "1"])
    result = finish(start(command, PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}"), 150)
    assert result.status != 0
    assert result.out.count("restart 1 of 1 since step 0: rank 1 on ") == 1
    assert "was ended by SIGKILL, after 1 restarts without a new checkpoint (--max-restarts 1)" in result.out


def test_a_request_to_stop_is_none_to_start_again(tiny, tmp_path):
    run = tmp_path / "run"
    process = start(python(TRAIN, *tiny.arguments(run, "run.steps=100000"), "--max-restarts", "3"), cold=True)
    wait_for(lambda: steps_of(run) >= 2, process)
    os.kill(process.pid, signal.SIGTERM)  # the supervisor alone
    result = finish(process, 60)
    assert result.status == 0 and "stopped at step " in result.out and "restart" not in result.out


def test_a_users_error_is_not_started_again(tiny, tmp_path):
    wrong = tiny.arguments(tmp_path / "run", "tokenizer.path=nowhere.model")
    result = finish(start(python(TRAIN, *wrong, "--max-restarts", "3")), 60)
    assert result.status == 2 and result.err.count("nowhere.model") == 1
    assert "not started again: rank 0 on " in result.out and "ended with status 2" in result.out


def test_two_kinds_of_restarts_are_refused(tiny, tmp_path):
    options = ("--nproc_per_node=1", f"--master_port={free_port()}", "--max-restarts=1")
    command = [str(BIN / "torchrun"), *options, str(TRAIN), *tiny.arguments(tmp_path / "run"), "--max-restarts", "1"]
    result = finish(start(command), 60)
    assert result.status != 0 and "give it to torchrun or to launch/train.py, not to both" in result.err
