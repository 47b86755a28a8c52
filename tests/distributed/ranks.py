"""Start a script on several local ranks over gloo, with a time limit that prints stacks instead of waiting."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.warm import popen

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_environment(**extra: str) -> dict[str, str]:
    """The environment of a test process: one thread, CPU, loopback, our programs first, no launcher's variables."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, "PATH": path, **fixed, **extra}


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    status: int
    out: str
    err: str


def try_ranks(
    script: Path,
    arguments: list[str],
    world_size: int,
    timeout_seconds: int = 150,
    folders: Sequence[Path] = (),
    **extra: str,
) -> list[Finished]:
    """Every rank, after each has ended by itself; one that takes too long prints its stacks and ends with status 1.

    `folders`: the working directory of each rank, as if each were on a host of its own.
    """
    port = free_port()
    processes, logs = [], []
    for rank in range(world_size):
        environment = cpu_environment(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            PYTHONPATH=str(REPOSITORY),
            TEST_TIMEOUT_SECONDS=str(timeout_seconds),
            **extra,
        )
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        logs.append((out, err))
        command = [sys.executable, "-m", "tests.distributed.with_stacks", str(script), *arguments]
        folder = folders[rank] if folders else REPOSITORY
        processes.append(popen(command, stdout=out, stderr=err, env=environment, cwd=folder))
    finished = []
    for process, files in zip(processes, logs, strict=True):
        try:
            process.wait(timeout_seconds + 15)
        except subprocess.TimeoutExpired:
            process.kill()
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        finished.append(Finished(process.wait(), *texts))
    return finished


class WarmRanks:
    """Ranks that run one job after another, given as lines of standard input; rank 0 answers with lines "found JSON".

    A job that fails or takes too long ends its rank, and with it the others; the next job starts them anew.
    """

    def __init__(self, script: Path, world_size: int, arguments: tuple[str, ...] = (), **extra: str) -> None:
        self._start = partial(self._spawn, script, world_size, arguments, extra)
        self._processes: list[subprocess.Popen[str]] = []

    def ask(self, job: list[str]) -> Any:
        """The answer to one job. Fails with the errors of all ranks."""
        try:
            return self._ask(job)
        except BaseException:  # such as a time limit: the next job must not get this one's answer
            for process in self._processes:
                process.kill()
            self.close()
            raise

    def _ask(self, job: list[str]) -> Any:
        if not self._processes:
            self._start()
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(job), file=process.stdin, flush=True)
        out = self._processes[0].stdout
        assert out is not None
        for line in out:
            if line.startswith("found "):
                return json.loads(line.removeprefix("found "))
        raise AssertionError(f"{job} failed\n{self.close()}")

    def close(self) -> str:
        """End the ranks; what they wrote to standard error."""
        errors = []
        for process, log in zip(self._processes, self._logs if self._processes else (), strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            log.seek(0)
            errors.append(log.read()[-6000:])
            log.close()
        self._processes = []
        return "\n---\n".join(errors)

    def _spawn(self, script: Path, world_size: int, arguments: tuple[str, ...], extra: dict[str, str]) -> None:
        port = str(free_port())
        self._logs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115
        for rank, log in enumerate(self._logs):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            world |= {"LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = cpu_environment(**world, PYTHONPATH=str(REPOSITORY), **extra)
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            command = [sys.executable, str(script), *arguments]
            self._processes.append(
                popen(
                    command, stdin=subprocess.PIPE, stdout=out, stderr=log, env=environment, cwd=REPOSITORY, text=True
                )
            )


def run_ranks(script: Path, arguments: list[str], world_size: int, timeout_seconds: int = 150, **extra: str) -> str:
    """Standard output of rank 0. Fails with every rank's output when one fails or takes too long."""
    ranks = try_ranks(script, arguments, world_size, timeout_seconds, **extra)
    report = "\n".join(f"--- rank {i}: {r.status}\n{r.out[-3000:]}\n{r.err[-6000:]}" for i, r in enumerate(ranks))
    assert not any(rank.status for rank in ranks), f"{script.name} failed on {world_size} ranks\n{report}"
    return ranks[0].out
