"""Worker processes that iterate over a dataset for one rank, through torch's DataLoader."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import psutil
import torch
from torch.utils.data import DataLoader, IterableDataset

T = TypeVar("T")
_CHECK_SECONDS = 0.2  # between a worker's looks at its rank


class Late(NamedTuple):
    """A worker for which `next` has waited since `seconds`; `is_stopped`: by a signal, such as SIGSTOP."""

    worker: int
    pid: int
    seconds: float
    is_stopped: bool


class WorkerProcesses(Generic[T]):
    """`count` processes that iterate over the same dataset; iterating yields one item of each in turn.

    They end on `close` or when the rank ends, and on nothing else: they ignore SIGINT, SIGTERM and SIGHUP. Launchers
    and terminals send these to the whole process tree, but a rank that is asked to stop needs data to finish its step.
    """

    def __init__(self, dataset: IterableDataset[T], count: int, ahead: int) -> None:
        """Start the processes, by multiprocessing's default start method. Each makes up to `ahead` items in advance."""
        context = _RecordingContext()
        self._processes = context.processes
        self._closed = multiprocessing.RawValue(ctypes.c_bool, False)  # shared with the workers; needs no lock
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=count,
            prefetch_factor=ahead,
            multiprocessing_context=context,
            generator=torch.Generator(),  # a draw from the global one would change what a resumed run draws
            worker_init_fn=partial(_end_with_rank, self._closed),
        )
        self._taken = 0
        self._waits_since: float | None = None
        try:
            self._items = iter(loader)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self._waits_since = time.monotonic()
        try:
            item = next(self._items)
        finally:
            self._waits_since = None
        self._taken += 1
        return item

    def late(self) -> Late | None:
        """The worker that `next` is waiting for, or another one that a signal has stopped: it may hold the lock of the
        queue into which all send. None if `next` is not waiting. Any thread may call it."""
        since, worker = self._waits_since, self._taken % len(self._processes)
        pid = self._processes[worker].pid
        if since is None or pid is None:
            return None
        seconds = time.monotonic() - since
        for number in sorted(range(len(self._processes)), key=lambda number: number != worker):  # its own first
            stopped = self._processes[number].pid
            if stopped is not None and _is_stopped(stopped):
                return Late(number, stopped, seconds, True)
        return Late(worker, pid, seconds, False)

    @property
    def has_failed(self) -> bool:
        """Whether a worker has ended by an error or a signal."""
        return any(process.exitcode for process in self._processes)

    def close(self) -> None:
        """End the processes and wait for them."""
        self._closed.value = True
        for process in self._processes:
            if process.pid is not None:  # it was started
                process.join()


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


class _RecordingContext(BaseContext):
    """Multiprocessing's default context, with a list of the processes that were created through it."""

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self._context = multiprocessing.get_context()

    def get_context(self, method: str | None = None) -> Any:
        """The context that queues, events and locks are created with."""
        return self._context

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:
        process = self._context.Process(*args, **kwargs)
        self.processes.append(process)
        return process


def _end_with_rank(closed: Any, _worker: int) -> None:
    """Called in a new worker: make it end when `closed` is set or its rank has ended, and ignore signals.

    A worker that outlives its rank would keep the rank's connections open, and the other ranks would wait for it.
    """
    gc.freeze()  # objects of the rank may wait for their threads when freed; a fork does not copy threads
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(os.getppid(), closed), daemon=True).start()


def _watch(parent: int, closed: Any) -> None:
    # With a fork server, the default from Python 3.14 on, the parent of a worker is the server, which lives as long as
    # its children. With fork, the pipe behind `is_alive` stays open in siblings that were forked later. So both checks.
    rank = multiprocessing.parent_process()
    while os.getppid() == parent and (rank is None or rank.is_alive()) and not closed.value:
        time.sleep(_CHECK_SECONDS)
    os._exit(0)  # with another status torch raises in the rank
