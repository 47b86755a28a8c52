"""The file `metrics.jsonl` of a run: one JSON object per line, for every logging interval and evaluation."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from dsmoe_vl.files import require_regular, write_atomically, writing


class MetricsFile:
    """Appends lines. A line is in the file as a whole or not at all, also on a full disk."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Drop the lines of steps that a resumed run takes again. Raises OSError."""
        self._path = path
        if path.exists():
            write_atomically(path, "".join(_lines_until(path, first_step)))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the values of `step`. Raises OSError; the next call then writes this line too."""
        # Nine digits distinguish any two fp32 numbers.
        short = {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in values.items()}
        self._unwritten += json.dumps({"step": step, **short}).encode() + b"\n"
        self._follow()
        end = self._file.seek(0, os.SEEK_END)
        left = self._unwritten
        try:
            with writing(self._path):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            raise
        self._unwritten = b""

    def _follow(self) -> None:
        """If the file was moved or removed, write to the one that is there now. Raises OSError."""
        try:
            if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            pass
        new = self._path.open("ab", buffering=0)
        self._file.close()
        self._file = new

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Without those of a run that ended before its first checkpoint: from step 0 it evaluates again."""
    kept: list[str] = []
    if step == 0:
        return kept
    for line in require_regular(path).read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line cut short by a crash
    return kept
