"""Start a script on several local ranks over gloo, with a time limit that prints stacks instead of waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_environment(**extra: str) -> dict[str, str]:
    """The environment of a test process: one thread, CPU, loopback, no launcher's variables."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **fixed, **extra}


def run_ranks(script: Path, arguments: list[str], world_size: int, timeout_seconds: int = 150) -> str:
    """Standard output of rank 0. Fails with every rank's output when one fails or takes too long."""
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
        )
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        logs.append((out, err))
        command = [sys.executable, "-m", "tests.distributed.with_stacks", str(script), *arguments]
        processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=REPOSITORY))
    failed = False
    for process in processes:
        try:
            failed |= process.wait(timeout_seconds + 15) != 0
        except subprocess.TimeoutExpired:
            failed = True
        if failed:
            for other in processes:
                other.kill()
    texts = []
    for out, err in logs:
        out.seek(0)
        err.seek(0)
        texts.append((out.read(), err.read()))
        out.close()
        err.close()
    if failed:
        report = "\n".join(f"--- rank {i}\n{out[-3000:]}\n{err[-6000:]}" for i, (out, err) in enumerate(texts))
        raise AssertionError(f"{script.name} failed on {world_size} ranks\n{report}")
    return texts[0][0]
