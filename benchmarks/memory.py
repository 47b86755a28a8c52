"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Memory:
    """Resident memory of this process by phase, bytes."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the highest value while the block runs."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        yield
        self.peaks[name] = self.read("VmHWM")

    @staticmethod
    def read(field: str) -> int:
        """A field of /proc/self/status."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
