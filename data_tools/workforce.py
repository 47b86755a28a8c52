"""Who makes the parts of a conversion: processes of this host, and hosts that mpirun has started."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from dsmoe_vl.errors import DataError
from dsmoe_vl.parallel.ranks import Ranks

Value = TypeVar("Value")
Progress = Callable[[int], Any]  # told of every record that is finished

_TICK_SECONDS = 0.2

_done: Any = None  # records that this pool has finished, shared by its processes


class Hosts:
    """The processes that mpirun started, this one being `rank` of `count`; without mpirun one."""

    def __init__(self) -> None:
        self._comm: Any = None
        self.rank, self.count = 0, 1
        ranks = Ranks.discover()
        if ranks.starts_mpi and ranks.world_size > 1:
            from mpi4py import MPI  # starts MPI, which is not wanted elsewhere

            self._comm = MPI.COMM_WORLD
            self.rank, self.count = self._comm.Get_rank(), self._comm.Get_size()

    def once(self, function: Callable[[], Value]) -> Value:
        """The result of `function` on rank 0, known to all. Raises its DataError on every rank."""
        value: Any = None
        error: str | None = None
        if self.rank == 0:
            try:
                value = function()
            except DataError as raised:
                error = str(raised)
        if self._comm is not None:
            value, error = self._comm.bcast((value, error))
        if error is not None:
            raise DataError(error)
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave this block, and by a DataError where one of them did."""
        error: str | None = None
        try:
            yield
        except DataError as raised:
            error = str(raised)
        found = [error] if self._comm is None else self._comm.allgather(error)
        if failed := [one for one in found if one is not None]:
            raise DataError(failed[0])

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """This rank's part of what is to be done."""
        return items[self.rank :: self.count]


def work(make: Callable[..., None], jobs: Sequence[tuple[Any, ...]], workers: int, progress: Progress) -> None:
    """`make(*job, progress)` for every job, by `workers` processes, or in this one with 1.

    All arguments can be pickled. What `make` raises ends the work and is raised here.
    """
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            make(*job, progress)
        return
    # Forked from a process that has no threads, whose locks a fork would copy, and that imports once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([make.__module__, "webdataset"])
    done = context.Value("q", 0)
    told = 0
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (done,)) as pool:
        waiting = {pool.submit(_make, make, job) for job in jobs}
        try:
            while waiting:
                finished, waiting = wait(waiting, _TICK_SECONDS, FIRST_COMPLETED)
                progress(done.value - told)
                told = done.value
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
