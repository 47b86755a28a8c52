"""SIGINT and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Set by the first signal; a second Ctrl-C ends the process at once.

    SIGTERM after SIGINT is what DeepSpeed's launcher sends on Ctrl-C, so a SIGTERM never counts as the second one.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
