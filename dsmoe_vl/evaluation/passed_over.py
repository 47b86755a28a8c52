"""What an evaluation passes over: bad samples, as many as data.max_bad_fraction allows, and samples of other tasks."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.console import one_line, printable
from dsmoe_vl.data.error_log import BadSample, check_budget
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.report.content import ScoreLabel

LABELS = {
    "bad_samples": ScoreLabel("bad samples, passed over", "count"),
    "other_samples": ScoreLabel("samples that are not of this task", "count"),
}
_LISTED = 5  # bad samples that are named
_ADVICE = "raise the budget with --max-bad-fraction"


class PassedOver:
    """Counts the samples of one folder that one task passes over: on this rank, or after `together` on all of them.

    Numbers of samples count all samples of the folder, from 0.
    """

    def __init__(self, source: SourceConfig, index: ShardIndex, max_bad_fraction: float, limit: int | None) -> None:
        """`limit`: maximum samples that are read, over all ranks."""
        self._source, self._index, self._max_bad_fraction = source, index, max_bad_fraction
        self._most = index.samples if limit is None else min(limit, index.samples)
        self._ends = list(accumulate(shard.samples for shard in index.shards))  # of the numbers, by shard
        self._read, self._bad = 0, 0
        self._first: list[tuple[int, BadSample]] = []  # the bad ones with the lowest numbers
        self._others: Counter[str] = Counter()  # by kind of reason

    def read(self) -> None:
        """Count a sample, whatever becomes of it."""
        self._read += 1

    def other(self, reason: str) -> None:
        """Count a sample that is not of the task; `reason` as `kind: detail`."""
        self._others[reason.partition(":")[0]] += 1

    def bad(self, number: int, reason: str, key: str = "") -> None:
        """Count a bad sample. Raises DataError once they are too many, whatever other ranks and later samples are."""
        shard = bisect_right(self._ends, number)
        place = number - (self._ends[shard - 1] if shard else 0)
        bad = BadSample(self._source.name, self._index.shards[shard].name, place, 0, reason, key)
        self._bad += 1
        if len(self._first) < _LISTED:
            self._first.append((number, bad))
        self._check(self._most, bad)

    def together(self, dealer: Dealer) -> None:
        """Make it the count of all ranks. Raises DataError, on every rank, if too many samples are bad. Collective."""
        ranks = dealer.gather((self._read, self._bad, self._first, self._others))
        self._read, self._bad = sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks)
        self._first = sorted((one for rank in ranks for one in rank[2]), key=lambda one: one[0])[:_LISTED]
        self._others = sum((rank[3] for rank in ranks), Counter())
        if self._first:
            self._check(self._read, self._first[-1][1])

    def scores(self) -> dict[str, float]:
        """What is not 0, by the names of `LABELS`."""
        counts = {"bad_samples": self._bad, "other_samples": self._others.total()}
        return {name: count for name, count in counts.items() if count}

    def described(self) -> Iterator[str]:
        """A line for bad samples, one for each of the first, and a line for the samples of other tasks."""
        if self._bad:
            yield f"bad and passed over: {self._bad} of {self._read} samples"
            for _, bad in self._first:
                name = printable(bad.key) if bad.key else f"number {bad.sample}"
                yield f"  {printable(bad.shard)}, {name}: {one_line(bad.reason.removeprefix(f'{bad.key}: '))}"
            if self._bad > len(self._first):
                yield f"  and {self._bad - len(self._first)} more"
        if self._others:
            by_count = sorted(self._others.items(), key=lambda item: (-item[1], item[0]))  # the same on any ranks
            kinds = ", ".join(f"{count} {_in_words(kind)}" for kind, count in by_count)
            yield f"not of this task, of {self._read} samples: {kinds}"

    def _check(self, read: int, last: BadSample) -> None:
        place = f"evaluation, {self._source.path}"
        check_budget(place, read, self._bad, self._max_bad_fraction, last, _ADVICE)


def _in_words(kind: str) -> str:
    """ "no caption" as "without a caption"; other kinds as they are."""
    if not kind.startswith("no "):
        return kind
    lacking = kind.removeprefix("no ")
    return f"without {'an' if lacking[0] in 'aeiou' else 'a'} {lacking}"
