"""The one handler of bad samples: counts them, names them, and stops a run that has too many."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsmoe_vl.errors import DataError

_PATIENCE = 100  # samples; the budget of a source is never less than its share of this many


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
    """What was read: samples per source, and those that were bad. Adds up."""

    samples: Counter[str] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)


class ErrorLog:
    """Counts the samples read in this process since `drain` and enforces the error budget."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._read: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._fresh = ReadCounts()

    def good(self, source: str) -> None:
        """Count a sample that was read."""
        self._read[source] += 1
        self._fresh.samples[source] += 1

    def bad(self, sample: BadSample) -> None:
        """Count a sample that was skipped. Raises DataError where its source is over budget."""
        source = sample.source
        self._read[source] += 1
        self._bad[source] += 1
        self._fresh.samples[source] += 1
        self._fresh.bad.append(sample)
        read, bad = self._read[source], self._bad[source]
        if bad > self._max_bad_fraction * max(read, _PATIENCE) or (bad == read and read >= _PATIENCE):
            raise DataError(
                f"source {source}: {bad} of {read} samples are bad, more than data.max_bad_fraction = "
                f"{self._max_bad_fraction}; the last is number {sample.sample} of {sample.shard}: {sample.reason}; "
                "repair the shards or raise the budget"
            )

    def drain(self) -> ReadCounts:
        """What was counted since the last call."""
        fresh, self._fresh = self._fresh, ReadCounts()
        return fresh


class ReadReport:
    """Counts of a whole run as its main process sees them, and the quarantine list."""

    def __init__(self, quarantine: Path | None) -> None:
        """Bad samples are appended to the file `quarantine`, one JSON object a line."""
        self._quarantine = quarantine
        self._samples: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {}

    def add(self, counts: ReadCounts) -> None:
        """Add what was read for one pack."""
        self._samples.update(counts.samples)
        for bad in counts.bad:
            self._reasons.setdefault(bad.source, Counter())[bad.reason.partition(":")[0]] += 1
        if counts.bad and self._quarantine:
            with open(self._quarantine, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in counts.bad)

    def values(self) -> dict[str, int]:
        """Of each source: SOURCE/samples read, SOURCE/errors among them, and SOURCE/errors/REASON."""
        values: dict[str, int] = {}
        for source, samples in sorted(self._samples.items()):
            reasons = self._reasons.get(source, Counter())
            values[f"{source}/samples"] = samples
            values[f"{source}/errors"] = reasons.total()
            values |= {f"{source}/errors/{reason}": count for reason, count in sorted(reasons.items())}
        return values
