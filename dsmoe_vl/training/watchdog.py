"""Ends a run that makes no progress, on every rank, and names the rank that stopped.

The main thread says which phase it begins; that sets attributes and nothing else. A thread adds the phases that were
begun since its last beat to one counter, which all ranks share: as long as it changes, some rank makes progress. If it
does not change for `run.stall_seconds`, each rank says so. A rank that does not has stopped; if all do, the one that
has begun the fewest phases keeps the others waiting.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil
import torch.distributed as dist

from dsmoe_vl.console import printable
from dsmoe_vl.data.background import BackgroundThread
from dsmoe_vl.parallel.first_host import own_store
from dsmoe_vl.parallel.process_group import FAILURES
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.training.stall import Status, lost_store, message

T = TypeVar("T")
_START_SECONDS = 600.0  # at least, before the first step has been taken: the start imports and compiles
_BEATS = 10  # at least, in stall_seconds
_BEAT_SECONDS = 5.0  # at most, between two
_STATUS = "watchdog/rank{}"
_PROGRESS, _NOTICED, _VERDICT = "watchdog/progress", "watchdog/noticed", "watchdog/verdict"
_KEYS = 3  # sample keys that a rank reports
_LAST_SECONDS = 3.0  # a rank's end, after the one that reports


class Watchdog:
    """Watches one rank from its creation to `close`. Needs a process group."""

    def __init__(self, ranks: Ranks, run_dir: Path, stall_seconds: float) -> None:
        """`run_dir`: for the stacks. Time is counted in beats of this thread, so a job that was suspended as a whole,
        or a machine that slept, has not stalled."""
        self.step = 0  # that is being taken; 0 before the first
        self.keys: Sequence[Sequence[str]] = ()  # of the samples of each of the step's batches
        self.has_started = False  # a step has been taken
        self._phase, self._passed = "start", 0
        self._waits_for: Callable[[], str] | None = None
        self._ranks, self._run_dir = ranks, run_dir
        self._interval = min(_BEAT_SECONDS, stall_seconds / _BEATS)
        self._limit = math.ceil(stall_seconds / self._interval)  # beats
        self._start_limit = max(self._limit, math.ceil(_START_SECONDS / self._interval))
        self._patience = 5 + 3 * self._interval  # seconds for other ranks to notice as well
        self._process = socket.gethostname(), os.getpid(), psutil.Process().create_time()
        self._store: dist.Store | None = own_store()
        self._store.set(_STATUS.format(ranks.rank), self._status().to_json())
        self._reported = 0  # phases, in the shared counter
        self._first: Status | None = None  # of rank 0, as it was last heard
        self._calls: BackgroundThread[int] = BackgroundThread()  # a store that does not answer blocks its caller
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, waits_for: Callable[[], str] | None = None) -> None:
        """The main thread begins a phase. Every rank calls this the same number of times. `waits_for`: says what the
        phase waits for besides other ranks; another thread calls it."""
        self._phase, self._waits_for = phase, waits_for
        self._passed += 1

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
        self._calls.close()

    def _watch(self) -> None:
        passed, total, quiet = 0, -1, 0  # quiet: beats without progress of any rank
        beat = self._calls.submit(self._beat)
        while not self._closed.wait(self._interval):
            quiet += 1
            if beat.done():
                if beat.exception() is None and beat.result() != total:
                    total, quiet = beat.result(), 0
                beat = self._calls.submit(self._beat)
            if self._passed != passed:  # also if the store does not answer
                passed, quiet = self._passed, 0
            if quiet >= (self._limit if self.has_started else self._start_limit):
                self._end(quiet * self._interval)
        wait([beat], self._patience)  # a thread inside of the store must not meet the end of the interpreter

    def _beat(self) -> int:
        """Report this rank's progress; the progress of all. Raises RuntimeError if the store has gone."""
        store = self._own()
        try:
            passed = self._passed
            store.set(_STATUS.format(self._ranks.rank), self._status().to_json())
            total = store.add(_PROGRESS, passed - self._reported)
            self._reported = passed
            if store.check([_STATUS.format(0)]):
                self._first = Status.from_json(store.get(_STATUS.format(0)))
            return total
        except RuntimeError:
            self._store = None
            raise

    def _status(self, stacks: str = "", stalled: bool = False) -> Status:
        phase = f"{self._phase} of step {self.step}" if self.step else self._phase
        keys = tuple(key for of_batch in self.keys for key in of_batch[:_KEYS])[:_KEYS]
        waits_for = self._waits_for() if stalled and self._waits_for is not None else ""
        return Status(
            self._ranks.rank, *self._process, phase, self._passed, stalled and _in_collective(), keys,
            sum(map(len, self.keys)), waits_for, stacks, stalled,
        )  # fmt: skip

    def _end(self, seconds: float) -> NoReturn:
        """Report who stopped, once, and end this rank and those of this host that cannot end themselves."""
        stacks = self._attempt(self._write_stacks) or ""
        noticed = self._attempt(lambda: self._notice(stacks), self._calls)  # after a beat, which would undo it
        text, stopped = "", None
        if noticed is None:  # rank 0 does not answer, so the ranks cannot agree: one of each host reports
            stopped = [] if self._first is None else [self._first]
            if self._ranks.rank == 1 or self._ranks.local_rank == 0:
                text = lost_store(self._first, self._status(stacks), seconds)
        elif noticed > 1:  # the first one to notice judges
            stopped = self._attempt(self._verdict)
        if stopped is None:
            statuses = self._attempt(self._statuses) or {}
            stopped = [status for status in statuses.values() if not status.stalled]
            text = message(statuses, self._ranks.world_size, seconds)
        if text:
            line = f"error (rank {self._ranks.rank}): {printable(text)}"
            self._attempt(lambda: print(line, file=sys.stderr, flush=True))  # its reader may have stopped as well
        if noticed is not None:
            verdict = json.dumps([status.to_json() for status in stopped])
            self._attempt(lambda: self._own().set(_VERDICT, verdict))
        for status in stopped:
            status.kill()
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):  # a stopped worker does not notice our end
                child.kill()
        if self._ranks.rank == 0 or not text:
            time.sleep(_LAST_SECONDS)  # rank 0 answers the others until they end; the one that reports ends first
        os._exit(1)

    def _attempt(self, call: Callable[[], T], thread: BackgroundThread[Any] | None = None) -> T | None:
        """The result of `call`; None if it fails or takes too long, as on a disk or a store that does not answer."""
        try:
            return (thread or BackgroundThread()).submit(call).result(2 * self._patience)
        except Exception:
            return None

    def _own(self) -> dist.Store:
        self._store = self._store or own_store()
        return self._store

    def _notice(self, stacks: str) -> int:
        """Report that this rank has noticed the stall; how many have, with this one."""
        store = self._own()
        store.set(_STATUS.format(self._ranks.rank), self._status(stacks, stalled=True).to_json())
        store.add(FAILURES, 1)  # a rank whose collective fails when others end has nothing to report
        return store.add(_NOTICED, 1)

    def _statuses(self) -> dict[int, Status]:
        """Of every rank that has one, after all have noticed the stall or had the time to."""
        store, end = self._own(), time.monotonic() + self._patience
        names = {rank: _STATUS.format(rank) for rank in range(self._ranks.world_size)}
        while True:
            found = {rank: Status.from_json(store.get(name)) for rank, name in names.items() if store.check([name])}
            if sum(status.stalled for status in found.values()) == len(names) or time.monotonic() > end:
                return found
            time.sleep(self._interval / 4)

    def _verdict(self) -> list[Status]:
        """The ranks that have stopped, by the rank that judges."""
        store = self._own()
        store.wait([_VERDICT], timedelta(seconds=2 * self._patience))
        return [Status.from_json(text) for text in json.loads(store.get(_VERDICT))]

    def _write_stacks(self) -> str:
        path = self._run_dir / f"stacks_{self._ranks.rank:05d}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file)
        return str(path)


def _in_collective() -> bool:
    """Whether the main thread is inside a collective of torch."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename == dist.distributed_c10d.__file__:
            return True
        frame = frame.f_back
    return False
