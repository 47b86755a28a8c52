"""Processes on this host and on the hosts of mpirun, among which work is divided."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from dsmoe_vl.errors import ConfigError, DsmoeVlError, as_user_error
from dsmoe_vl.parallel.ranks import Ranks

Value = TypeVar("Value")
Progress = Callable[[int], Any]  # called with the number of records that were finished

_TICK_SECONDS = 0.2

_done: Any = None  # records finished by the pool, shared by its processes


class Hosts:
    """The processes that mpirun started; this one is number `rank` of `count`. Without a launcher there is one.

    Raises ConfigError under other launchers, whose processes would all do the whole work.
    """

    def __init__(self) -> None:
        self._comm: Any = None
        self.rank, self.count = 0, 1
        ranks = Ranks.discover()
        if ranks.world_size == 1:
            return
        if ranks.starts_mpi:
            from mpi4py import MPI  # starts MPI

            self._comm = MPI.COMM_WORLD
            self.rank, self.count = self._comm.Get_rank(), self._comm.Get_size()
        if self.count != ranks.world_size:
            raise ConfigError(
                f"the launcher started {ranks.world_size} processes, but MPI knows of {self.count}: use the mpirun of "
                "this environment, which several hosts need, or start one process without a launcher"
            )

    def once(self, function: Callable[[], Value]) -> Value:
        """Call `function` on rank 0; returns its result, or raises its user error, on every rank."""
        value: Any = None
        error: DsmoeVlError | None = None
        if self.rank == 0:
            try:
                value = function()
            except Exception as raised:
                error = _user_error(raised)
        if self._comm is not None:
            value, error = self._comm.bcast((value, error))
        if error is not None:
            raise error
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waits for all ranks at the end of the block. If one raised a user's error there, all do."""
        error: DsmoeVlError | None = None
        try:
            yield
        except Exception as raised:
            error = _user_error(raised)
        found = [error] if self._comm is None else self._comm.allgather(error)
        if failed := [one for one in found if one is not None]:
            raise failed[0]

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """This rank's part of `items`."""
        return items[self.rank :: self.count]


def _user_error(error: Exception) -> DsmoeVlError:
    """The user's error behind `error`, which ranks can send each other; raises `error` itself if there is none."""
    known = as_user_error(error)
    if known is None:
        raise error
    return known


def work(make: Callable[..., None], jobs: Sequence[tuple[Any, ...]], workers: int, progress: Progress) -> None:
    """Call `make(*job, progress)` for every job, in `workers` processes; with 1, in this process.

    All arguments must be picklable. An exception of `make` ends the work and is raised here.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            make(*job, progress)
        return
    # Forked from a server that imports once and has no threads: a fork would copy their locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([make.__module__, "webdataset"])
    done = context.Value("q", 0)
    reported = 0
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (done,)) as pool:
        waiting = {pool.submit(_make, make, job) for job in jobs}
        try:
            while waiting:
                finished, waiting = wait(waiting, _TICK_SECONDS, FIRST_COMPLETED)
                progress(done.value - reported)
                reported = done.value
                for future in finished:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(done: Any) -> None:
    global _done
    _done = done


def _make(make: Callable[..., None], job: tuple[Any, ...]) -> None:
    make(*job, _count)


def _count(records: int) -> None:
    with _done.get_lock():
        _done.value += records
