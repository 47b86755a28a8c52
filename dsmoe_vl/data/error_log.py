"""The one handler of bad samples: counts them, names them, and stops a run that has too many."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsmoe_vl.errors import DataError

_PATIENCE = 100  # samples; the budget of a source is never less than its share of this many
_EPOCH = "/epoch"  # ends the name of the one value of a report that does not add up


@dataclass(frozen=True)
class BadSample:
    """A sample that was skipped. `reason` is a DataError's message, its category before the first colon."""

    source: str
    shard: str
    sample: int  # number in the shard
    epoch: int
    reason: str


@dataclass
class ReadCounts:
    """What was read: samples per source, those that were bad, and the newest epoch of each source."""

    samples: Counter[str] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)


class ErrorLog:
    """Counts the samples read in this process since `drain` and enforces the error budget of the whole run."""

    def __init__(self, max_bad_fraction: float, part: str = "data.sources") -> None:
        """`part` of the recipe has the sources."""
        self._part = part
        self._max_bad_fraction = max_bad_fraction
        self._read: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._fresh = ReadCounts()

    def resume(self, read: Mapping[str, int], bad: Mapping[str, int]) -> None:
        """Charge the budget with what was read before the run was continued; `drain` does not give it."""
        self._read.update(read)
        self._bad.update(bad)

    def good(self, source: str, epoch: int) -> None:
        """Count a sample that was read."""
        self._count(source, epoch)

    def bad(self, sample: BadSample) -> None:
        """Count a sample that was skipped. Raises DataError where its source is over budget."""
        source = sample.source
        self._count(source, sample.epoch)
        self._bad[source] += 1
        self._fresh.bad.append(sample)
        read, bad = self._read[source], self._bad[source]
        if bad > self._max_bad_fraction * max(read, _PATIENCE) or (bad == read and read >= _PATIENCE):
            raise DataError(
                f"{self._part}, {source}: {bad} of {read} samples are bad, more than data.max_bad_fraction = "
                f"{self._max_bad_fraction}; the last is number {sample.sample} of {sample.shard}: {sample.reason}; "
                "repair the shards or raise the budget"
            )

    def drain(self) -> ReadCounts:
        """What was counted since the last call."""
        fresh, self._fresh = self._fresh, ReadCounts()
        return fresh

    def _count(self, source: str, epoch: int) -> None:
        self._read[source] += 1
        self._fresh.samples[source] += 1
        self._fresh.epochs[source] = max(epoch, self._fresh.epochs.get(source, 0))


class ReadReport:
    """Counts since the start as the main process sees them, the run's epochs, and the quarantine list."""

    def __init__(self, quarantine: Path | None) -> None:
        """Bad samples are appended to the file `quarantine`, one JSON object a line."""
        self._quarantine = quarantine
        self._samples: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {}
        self.epochs: dict[str, int] = {}  # by source, the newest that has begun; 0 is the first

    def add(self, counts: ReadCounts) -> None:
        """Add what was read for one pack."""
        self._samples.update(counts.samples)
        self.epochs = newest_epochs([self.epochs, counts.epochs])
        for bad in counts.bad:
            self._reasons.setdefault(bad.source, Counter())[bad.reason.partition(":")[0]] += 1
        if counts.bad and self._quarantine:
            lines = "".join(json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in counts.bad)
            with self._quarantine.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    lines = lines if file.read() == b"\n" else "\n" + lines  # a crash has cut the last line
                file.write(lines.encode("utf-8", "replace"))

    def values(self) -> dict[str, int]:
        """Of each source: SOURCE/samples read, SOURCE/errors among them, SOURCE/errors/REASON, and SOURCE/epoch."""
        values: dict[str, int] = {}
        for source in sorted(self.epochs):
            reasons = self._reasons.get(source, Counter())
            values[f"{source}{_EPOCH}"] = self.epochs[source]
            values[f"{source}/samples"] = self._samples[source]
            values[f"{source}/errors"] = reasons.total()
            values |= {f"{source}/errors/{reason}": count for reason, count in sorted(reasons.items())}
        return values


def merge_reports(reports: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The `ReadReport.values` of all ranks as one: counts add up, an epoch is the newest that any rank has begun."""
    merged: dict[str, int] = {}
    for report in reports:
        for name, value in report.items():
            before = merged.get(name, 0)
            merged[name] = max(before, value) if name.endswith(_EPOCH) else before + value
    return merged


def newest_epochs(epochs: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The newest epoch of every source."""
    newest: dict[str, int] = {}
    for one in epochs:
        newest |= {source: max(epoch, newest.get(source, 0)) for source, epoch in one.items()}
    return newest
