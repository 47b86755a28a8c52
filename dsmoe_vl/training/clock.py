"""Times the phases of a step without synchronising host and accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up the time of named phases; on CUDA between two stream events, which only `read` waits for."""

    def __init__(self, device: torch.device) -> None:
        self.entered: Callable[[str], None] = lambda phase: None  # called when the main thread begins a phase
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the `with` to `name`."""
        self.entered(name)
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - started)

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last call. On CUDA it waits for the last event."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
