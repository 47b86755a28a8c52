"""Bad samples are counted and listed, and too many of them end the run."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsmoe_vl.console import tell
from dsmoe_vl.errors import DataError

_MIN_SAMPLES = 100  # the error budget of a source is computed for at least so many samples
_EPOCH = "/epoch"  # suffix of the only value in a report that is not a count


@dataclass(frozen=True)
class BadSample:
    """A sample that was skipped. `reason` is the message of a DataError; it begins with a category and a colon."""

    source: str
    shard: str
    sample: int  # number in the shard
    epoch: int
    reason: str
    key: str = ""  # unknown if the sample could not be read


@dataclass
class ReadCounts:
    """Samples that were read, per source; the bad and the flawed ones; the newest epoch of each source."""

    samples: Counter[str] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)
    flaws: dict[str, Counter[str]] = field(default_factory=dict)  # of samples that were used, by kind
    epochs: dict[str, int] = field(default_factory=dict)


class ErrorLog:
    """Counts the samples that this process reads and enforces the error budget of the run."""

    def __init__(self, max_bad_fraction: float, part: str = "data.sources") -> None:
        """`part`: the recipe's table of the sources, for messages."""
        self._part = part
        self._max_bad_fraction = max_bad_fraction
        self._read: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._fresh = ReadCounts()

    def resume(self, read: Mapping[str, int], bad: Mapping[str, int]) -> None:
        """Count what was read before the run was continued towards the budget, but not in `drain`."""
        self._read.update(read)
        self._bad.update(bad)

    def good(self, source: str, epoch: int, flaws: Iterable[str] = ()) -> None:
        """Count a sample that was read, and its `Contents.flaws`."""
        self._count(source, epoch)
        for flaw in flaws:
            self._fresh.flaws.setdefault(source, Counter())[flaw.partition(":")[0]] += 1

    def bad(self, sample: BadSample) -> None:
        """Count a sample that was skipped. Raises DataError if its source is over budget."""
        source = sample.source
        self._count(source, sample.epoch)
        self._bad[source] += 1
        self._fresh.bad.append(sample)
        check_budget(f"{self._part}, {source}", self._read[source], self._bad[source], self._max_bad_fraction, sample)

    def drain(self) -> ReadCounts:
        """The counts since the last call."""
        fresh, self._fresh = self._fresh, ReadCounts()
        return fresh

    def _count(self, source: str, epoch: int) -> None:
        self._read[source] += 1
        self._fresh.samples[source] += 1
        self._fresh.epochs[source] = max(epoch, self._fresh.epochs.get(source, 0))


def check_budget(
    place: str, read: int, bad: int, max_bad_fraction: float, last: BadSample, advice: str = "raise the budget"
) -> None:
    """Raise DataError if `bad` samples of those `read` are too many. `last`: one of them."""
    if bad > max_bad_fraction * max(read, _MIN_SAMPLES) or (bad == read and read >= _MIN_SAMPLES):
        raise DataError(
            f"{place}: {bad} of {read} samples are bad, more than data.max_bad_fraction = {max_bad_fraction}; the last "
            f"is number {last.sample} of {last.shard}: {last.reason}; repair the shards or {advice}"
        )


class ReadReport:
    """In the rank: counts since its start, the epochs of the run, and the list of bad samples."""

    def __init__(self, quarantine: Path | None) -> None:
        """Bad samples are appended to the file `quarantine`, one JSON object per line."""
        self._quarantine = quarantine
        self._unlisted = ""  # lines of bad samples that have yet to be written
        self._has_warned = False
        self._samples: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {}
        self._flaws: dict[str, Counter[str]] = {}
        self.epochs: dict[str, int] = {}  # by source, the newest that has begun, from 0

    def add(self, counts: ReadCounts) -> None:
        """Add the counts of one pack."""
        self._samples.update(counts.samples)
        self.epochs = newest_epochs([self.epochs, counts.epochs])
        for source, flaws in counts.flaws.items():
            self._flaws.setdefault(source, Counter()).update(flaws)
        for bad in counts.bad:
            self._reasons.setdefault(bad.source, Counter())[bad.reason.partition(":")[0]] += 1
        if self._quarantine is not None:
            self._unlisted += "".join(json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in counts.bad)
            self._list(self._quarantine)

    def _list(self, quarantine: Path) -> None:
        """Append the lines that have not been written yet; on a full disk they wait for the next bad sample."""
        if not self._unlisted:
            return
        try:
            with quarantine.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":  # a crash or a full disk has cut the last line
                        file.write(b"\n")
                file.write(self._unlisted.encode("utf-8", "replace"))
        except OSError as error:
            if not self._has_warned:
                place = f"warning: {quarantine} cannot be written: {error.strerror}"
                tell(f"{place}; the run continues without its list of bad samples", sys.stderr)
            self._has_warned = True
        else:
            self._unlisted = ""

    def values(self) -> dict[str, int]:
        """For each source: SOURCE/samples, SOURCE/errors (bad samples), SOURCE/errors/REASON, SOURCE/epoch, and
        SOURCE/flaws/KIND, entries that were left out of samples that were used."""
        values: dict[str, int] = {}
        for source in sorted(self.epochs):
            reasons = self._reasons.get(source, Counter())
            values[f"{source}{_EPOCH}"] = self.epochs[source]
            values[f"{source}/samples"] = self._samples[source]
            values[f"{source}/errors"] = reasons.total()
            values |= {f"{source}/errors/{reason}": count for reason, count in sorted(reasons.items())}
            flaws = self._flaws.get(source, Counter())
            values |= {f"{source}/flaws/{kind}": count for kind, count in sorted(flaws.items())}
        return values


def merge_reports(reports: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The `ReadReport.values` of all ranks in one: sums of counts, and the newest epoch of any rank."""
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
