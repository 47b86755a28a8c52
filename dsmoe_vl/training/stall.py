"""What is known of the ranks of a run that makes no progress, who of them is to blame, and the message about it."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import psutil

_FEW = 3  # ranks, samples and files that a message lists; it counts the others
_SAME_START_SECONDS = 5.0  # two clocks of one host; a process id is not used again so soon


@dataclass(frozen=True)
class Status:
    """One rank. `born`: when its process started, seconds since the epoch; with host and pid it is one process.

    `passed`: phases that its main thread has begun. All ranks begin the same ones, so the smallest number is behind.
    `in_collective`: whether the main thread is inside a collective. `keys`: the first of its step's `samples` samples.
    `waits_for`: what the main thread waits for besides other ranks. `stacks`: the file with its threads' stacks.
    `stalled`: whether it has noticed the stall itself.
    """

    rank: int
    host: str
    pid: int
    born: float
    phase: str = ""
    passed: int = 0
    in_collective: bool = False
    keys: tuple[str, ...] = ()
    samples: int = 0
    waits_for: str = ""
    stacks: str = ""
    stalled: bool = False

    def to_json(self) -> str:
        """For the store that connects the ranks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Status:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "keys": tuple(values["keys"])})

    def process(self) -> psutil.Process | None:
        """Its process, if that runs on this host. Containers that start together have the same process ids."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.born) < _SAME_START_SECONDS
        except psutil.Error:
            return None
        return process if is_same else None

    def kill(self) -> None:
        """End its process and those that it started, if it runs on this host; also if a signal has stopped it."""
        with contextlib.suppress(psutil.Error):
            process = self.process()
            for one in [] if process is None else [*process.children(recursive=True), process]:
                one.kill()

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def message(statuses: Mapping[int, Status], ranks: int, seconds: float) -> str:
    """Which of the `ranks` ranks stopped the others, and where they are. `seconds`: since the last progress."""
    absent = [rank for rank in range(ranks) if rank not in statuses]
    alive = [status for status in statuses.values() if status.stalled]
    silent = [status for status in statuses.values() if not status.stalled]
    if silent or absent:
        blamed = silent
        causes = [*map(_silence, silent), *(f"rank {rank} has not been heard of" for rank in absent)]
    else:
        blamed = _behind(alive)
        causes = [_lag(status, is_alone=len(blamed) == 1) for status in blamed]
    others = [status for status in alive if status not in blamed]
    parts = [f"no rank has made progress for {seconds:.0f} s: {_few(causes, '; ')}"]
    if others:
        parts.append(f"The others are in: {_few(list(dict.fromkeys(status.phase for status in others)), ' / ')}")
    for status in blamed[:1]:
        if status.samples:
            parts.append(f"Samples of that step on rank {status.rank}: {_few(status.keys, count=status.samples)}")
    stacks = [status.stacks for status in alive if status.stacks]
    if stacks:
        parts.append(f"Stacks: {_few(stacks)}")
    if not silent and not absent:
        parts.append("If a step, an evaluation or a save may take that long, raise run.stall_seconds")
    return ". ".join(parts)


def lost_store(first: Status | None, own: Status, seconds: float) -> str:
    """Of a rank that no longer reaches rank 0, whose process connects the ranks. `first`: rank 0, as last heard."""
    name = "rank 0" if first is None else first.name
    where = f". Stacks of a rank that runs: {own.stacks}" if own.stacks else ""
    return (
        f"no rank has made progress for {seconds:.0f} s: {name} does not answer: {_state(first)}"
        f"{f'; last heard in: {first.phase}' if first is not None and first.phase else ''}. {own.name} is in: "
        f"{own.phase}{where}"
    )


def _behind(alive: Sequence[Status]) -> list[Status]:
    """Ranks that have not reached what the others wait in; all if that cannot be seen."""
    least = min(status.passed for status in alive)
    last = [status for status in alive if status.passed == least]
    return [status for status in last if not status.in_collective] or last


def _silence(status: Status) -> str:
    return f"{status.name} does not run: {_state(status)}; last heard in: {status.phase}"


def _lag(status: Status, is_alone: bool) -> str:
    waits = f"; {status.waits_for}" if status.waits_for else ""
    return f"{status.name} {'is behind' if is_alone else 'is'} in: {status.phase}{waits}"


def _state(status: Status | None) -> str:
    """Why a process may be silent, as far as this host can see."""
    process = None if status is None else status.process()
    if process is None:
        return "its process or its host has stopped, or the network between them"
    return "a signal has stopped it" if process.status() == psutil.STATUS_STOPPED else "its threads hang"


def _few(names: Collection[str], separator: str = ", ", count: int = 0) -> str:
    """The first few of `count` names, and how many more."""
    shown = list(names)[:_FEW]
    more = max(count, len(names)) - len(shown)
    return separator.join(shown) + (f" and {more} more" if more else "")
