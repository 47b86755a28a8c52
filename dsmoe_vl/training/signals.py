"""Turns signals, the end of the launcher and the loss of the output's reader into a request to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from dsmoe_vl.command import has_lost_reader

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """A request to stop after the current step: the first SIGINT, SIGTERM or SIGHUP in the `with` block, the end of
    DeepSpeed's launcher, or output that nobody reads any more. A second Ctrl-C ends the process at once.

    On Ctrl-C, DeepSpeed's launcher sends SIGTERM after SIGINT, so a SIGTERM never counts as the second signal. A signal
    to the `deepspeed` command ends only that command: its ranks would continue and block the port of the next run. Over
    ssh, a closed pipe may be all that they notice of its end. `nohup` ignores SIGHUP, which therefore stays ignored.
    Create this soon after the process starts, because it records the launcher at that time.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._previous: dict[int, Any] = {}
        self._launchers = _launchers()

    @property
    def received(self) -> bool:
        """Whether this process should stop."""
        return self._signalled or self._launchers != _launchers() or has_lost_reader()

    @property
    def has_deepspeed_launcher(self) -> bool:
        """Whether the `deepspeed` command started this process."""
        return bool(self._launchers)

    def __enter__(self) -> StopRequest:
        for number in _NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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
    """Process ids of DeepSpeed's launcher on this host and of its parent; () for other launchers or without /proc."""
    process = Path("/proc", str(os.getppid()))
    try:
        if b"deepspeed.launcher.launch" not in (process / "cmdline").read_bytes():
            return ()
        # After the name, which may contain any character, come the state and the parent.
        return int(process.name), int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return ()
