"""The same run under every launcher: the same losses, whoever started the ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from launch.evaluate import parse
from tests.distributed.ranks import free_port
from tests.support.runs import TRAIN, curve, deepspeed_command, finish, metrics, python, start

BIN = Path(python()[0]).parent


def mpirun(port, *arguments):
    """Open MPI on this machine, over loopback; the port is in the environment."""
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    return [str(BIN / "mpirun"), *options, *python(TRAIN, *arguments)]


def torchrun(port, *arguments):
    options = ["--nproc_per_node", "2", "--master_port", str(port)]
    return [str(BIN / "torchrun"), *options, str(TRAIN), *arguments]


def torch_distributed_launch(port, *arguments):
    """The predecessor of torchrun, which passes --local-rank."""
    options = ["-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", port]
    return python(*options, TRAIN, *arguments)


@pytest.mark.parametrize("launcher", [mpirun, torchrun, pytest.param(torch_distributed_launch, marks=pytest.mark.long)])
def test_two_ranks_train_as_under_deepspeed(launcher, tiny, trained):
    run = tiny.folder / "runs" / launcher.__name__
    port = free_port()
    environment = {"MASTER_PORT": str(port)} if launcher is mpirun else {}
    result = finish(start(launcher(port, *tiny.arguments(run)), cold=True, **environment))
    assert result.status == 0, result.out + result.err
    assert curve(run) == curve(trained)
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # the memory that DeepSpeed leaves behind


def test_one_process_trains_without_a_launcher(tiny):
    """Expert parallelism falls back to one rank, with a note."""
    run = tiny.folder / "runs" / "alone"
    result = finish(start(python(TRAIN, *tiny.arguments(run, "run.steps=6")), cold=True))
    assert result.status == 0, result.out + result.err
    assert "note: expert_parallel.autoep_size = 2" in result.out and "using 1" in result.out
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.long
def test_a_build_that_a_time_limit_ends_is_not_started_over(tiny, tmp_path):
    """It uses the environment's ninja, whatever comes first in PATH, and says that it compiles."""
    wrong, builds = tmp_path / "bin" / "ninja", tmp_path / "builds"
    wrong.parent.mkdir()
    wrong.write_text("#!/bin/sh\nexit 1\n")
    wrong.chmod(0o755)
    quick = tmp_path / "c++"
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    quick.chmod(0o755)
    environment = {
        "CXX": str(quick),
        "TORCH_EXTENSIONS_DIR": str(builds),
        "PATH": f"{wrong.parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = python(TRAIN, *tiny.arguments(tmp_path / "run", "run.steps=1", "run.evaluate_every=0"))
    process = start(command, **environment)
    begun = time.monotonic() + 120
    while not list(builds.glob("**/build.ninja")):
        assert process.poll() is None and time.monotonic() < begun
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert "compiling DeepSpeed" in process.communicate()[0]
    built = time.monotonic() + 240
    while not list(builds.glob("**/deepspeed_shm_comm.so")):
        assert time.monotonic() < built
        time.sleep(0.2)
    result = finish(start(command, **environment))
    assert result.status == 0, result.err


def test_evaluation_accepts_either_spelling(monkeypatch):
    for option in ("--local_rank=1", "--local-rank=1"):
        monkeypatch.setattr("sys.argv", ["evaluate.py", option, "--run", "runs/x"])
        assert parse().run == Path("runs/x")


def test_strict_refuses_what_one_process_cannot_have(tiny):
    result = finish(start(python(TRAIN, *tiny.arguments(tiny.folder / "runs" / "strict"), "--strict")))
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: expert_parallel.autoep_size = 2 in ") and result.err.count("\n") == 1


def test_a_rank_that_is_killed_ends_the_job(tiny):
    """Also its loader processes, which would hold its connections open and keep the other rank waiting."""
    run = tiny.folder / "runs" / "killed"
    process = start(deepspeed_command(tiny.arguments(run, "data.workers=1", "run.steps=100000")))
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    victims = [child for child in started if "--local_rank=1" in child.cmdline() and child.name() != "pt_data_worker"]
    os.kill(victims[0].pid, signal.SIGKILL)
    assert finish(process).status != 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in started)
