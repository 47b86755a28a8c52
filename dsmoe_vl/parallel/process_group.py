"""Start and end of the process group, in the same way under every launcher; collectives on the host."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from dsmoe_vl.config.recipe import RunConfig
from dsmoe_vl.cpu_kernels.library import build_folder
from dsmoe_vl.errors import ConfigError, NetworkError, as_user_error
from dsmoe_vl.parallel.first_host import connect, find_first_host
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.parallel.rendezvous import meet

T = TypeVar("T")

# The fork makes it no descendant of this process: launchers end those one by one.
_BUILD = """
import os
if os.fork():
    os._exit(0)
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
"""
FAILURES = "failures"  # a counter in the ranks' store: who makes it 1 reports
_QUIET_SECONDS = 4.0  # loading what is compiled takes less
_COMPILING = "compiling DeepSpeed's CPU communication (once per environment, about a minute)"

# A collective's limit is long enough for a first batch from a slow file system, whatever run.stall_seconds. If a rank
# dies, the launcher ends the others sooner; during training, the watchdog ends a stall sooner.
_LEAST_SECONDS = 1200


def start_process_group(ranks: Ranks, device: str, stall_seconds: float = RunConfig.stall_seconds) -> None:
    """Initialise torch.distributed and DeepSpeed, once all ranks are there and all hosts reach each other.

    The collectives of every group, also of those that DeepSpeed makes later, fail after 20 minutes, or after twice
    `stall_seconds` if that is longer.

    Raises ConfigError if several ranks were started without MASTER_ADDR, if the port is in use, or if ranks were
    started with different numbers of ranks; NetworkError if ranks are not there, or hosts do not reach each other.
    """
    find_first_host(ranks)
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cpu":
        _build_cpu_communication()
    timeout = timedelta(seconds=max(_LEAST_SECONDS, 2 * stall_seconds))
    # DeepSpeed makes its groups without a timeout, and torch then takes one of these two.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    store = connect(ranks, timeout)
    meet(ranks, store, timeout.total_seconds())
    dist.init_process_group(backend, timeout=timeout, store=store, rank=ranks.rank, world_size=ranks.world_size)
    with contextlib.redirect_stdout(io.StringIO()):  # else every rank prints that the ops were built
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    if device == "cpu":
        _free_names_of_shared_memory(ranks.rank)


def _free_names_of_shared_memory(rank: int) -> None:
    """Unlink the shared-memory buffers of DeepSpeed's CPU communication; processes that have them open still use them.

    DeepSpeed never removes them: every run would leave 66 MiB per rank in /dev/shm. Once that is full, every process of
    the machine becomes very slow.
    """
    dist.barrier()  # all ranks have opened the buffers of all others
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def is_first_to_fail(ranks: Ranks) -> bool:
    """Whether this rank is the first to fail. Others fail for the same reason or because of it: one message is enough.

    Not a collective. Rank 0 hosts the counter, so it must stay alive for a moment after its own call.
    """
    world = dist.group.WORLD
    if world is None:  # nothing connects the ranks yet
        return ranks.local_rank == 0  # hosts have files of their own
    try:
        return world.get_group_store().add(FAILURES, 1) == 1
    except RuntimeError:  # rank 0 is gone already
        return False


def end_process_group() -> None:
    """End it, and all groups of ranks. Collective."""
    dist.destroy_process_group()


def end_rank(error: BaseException, ranks: Ranks) -> NoReturn:
    """Print the error, unless another rank failed first, and end the process at once: other ranks may wait for this one
    in a collective. Exit status 2 for a user error that another start would not change, else 1."""
    sys.stdout.flush()
    is_first, known = is_first_to_fail(ranks), as_user_error(error)
    if is_first and known is not None:
        print(f"error (rank {ranks.rank}): {known}", file=sys.stderr, flush=True)
    elif is_first:
        print(f"rank {ranks.rank} failed:", file=sys.stderr)
        traceback.print_exception(error)
    if ranks.rank == 0:
        time.sleep(1)  # ranks that fail at the same time still use the counter of this rank
    elif not is_first:
        time.sleep(3)  # a launcher returns the status of the rank that ends first
    os._exit(1 if known is None or isinstance(known, NetworkError) else 2)


def _build_cpu_communication() -> None:
    """Compile DeepSpeed's shared-memory ops once per machine, before DeepSpeed itself would.

    PyTorch locks such a build with a file. A killed process leaves the file behind, and every later process would wait
    forever. We take an flock first, which ends with its process, so any such file found under it is stale.
    The first build is a process of its own, with this lock: it comes to its end if a signal or a time limit ends this
    process. Ninja is the environment's: another version would compile everything again, and pdsh does not pass PATH on.
    Raises ConfigError if the build fails.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    tools = sysconfig.get_path("scripts")
    if os.environ.get("PATH", "").split(os.pathsep)[0] != tools:
        os.environ["PATH"] = os.pathsep.join(filter(None, (tools, os.environ.get("PATH"))))
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(build_folder())))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "dsmoe_vl.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        for stale in folder.glob("**/deepspeed_shm_comm/lock"):
            stale.unlink(missing_ok=True)
        is_built = any(folder.glob("**/deepspeed_shm_comm/*.so"))
        notice = threading.Timer(_QUIET_SECONDS if is_built else 0, print, [_COMPILING], {"flush": True})
        notice.daemon = True
        notice.start()
        try:
            if not is_built:
                subprocess.run(
                    [sys.executable, "-c", _BUILD],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,  # waits for the end of all that have it open
                    stderr=subprocess.DEVNULL,  # if it fails, `load` fails in the same way below
                    start_new_session=True,
                    pass_fds=(ours.fileno(),),
                    check=False,
                )
            builder.load(verbose=False)
        except Exception as error:  # compiler and ninja failures have many types
            raise ConfigError(
                f"DeepSpeed's CPU communication could not be compiled in {folder}: install a C++ compiler (g++) and "
                f"ninja, then start again. {str(error).splitlines()[0]}"
            ) from error
        finally:
            notice.cancel()


class HostGroup:
    """Small collectives on the host (gloo), without the accelerator: counts before a forward, a request to stop."""

    def __init__(self) -> None:
        self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def sum(self, values: list[int]) -> list[int]:
        """Element-wise sums over all ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: int) -> int:
        """The largest value of any rank."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def _reduce(self, values: list[int], operation: dist.ReduceOp.RedOpType) -> list[int]:
        if dist.get_world_size() == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[T] = [value] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def collect(self, value: T) -> list[T] | None:
        """Every rank's value, in rank order, on rank 0; None on other ranks."""
        if dist.get_world_size() == 1:
            return [value]
        values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(value, values, group=self._group)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        values = [value]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)
