"""SIGINT, SIGTERM and the end of the launcher as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any


class StopRequest:
    """Received with the first signal, or when DeepSpeed's launcher is gone; a second Ctrl-C ends the process at once.

    SIGTERM after SIGINT is what DeepSpeed's launcher sends on Ctrl-C, so a SIGTERM never counts as the second one.
    A signal to the `deepspeed` command itself ends that command alone. Its ranks would go on without anybody, and hold
    the port of the next run. The launcher is the one that is there when this is made: soon after the process started.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._previous: dict[int, Any] = {}
        self._launchers = _launchers()

    @property
    def received(self) -> bool:
        """Whether this process should stop."""
        return self._signalled or self._launchers != _launchers()

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True


def _launchers() -> tuple[int, ...]:
    """Process ids of DeepSpeed's launcher on this host and of what started that; () under others, and without /proc."""
    process = Path("/proc", str(os.getppid()))
    try:
        if b"deepspeed.launcher.launch" not in (process / "cmdline").read_bytes():
            return ()
        # The fields after the name, which may hold anything, are the state and the parent.
        return int(process.name), int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return ()
