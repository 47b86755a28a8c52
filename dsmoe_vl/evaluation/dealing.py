"""Distributes the samples of an evaluation over ranks, and merges the results in the order of the samples.

Sample number i belongs to rank i % ranks: no padding and no duplicates, for any number of samples. Ranks do not
communicate while they work, so each works at its own pace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.parallel.ranks import Ranks

# Its module imports DeepSpeed, which takes seconds and is not needed by one process.
if TYPE_CHECKING:
    from dsmoe_vl.parallel.process_group import HostGroup

T = TypeVar("T")


class Dealer:
    """Assigns samples to ranks. Without a group, one process evaluates all."""

    def __init__(self, ranks: Ranks | None = None, group: HostGroup | None = None) -> None:
        assert group is not None or ranks is None or ranks.world_size == 1, "several ranks need a group"
        self.rank, self.count = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        self._group = group

    def own(self, limit: int) -> int:
        """Number of this rank's samples among the first `limit`."""
        return len(range(self.rank, limit, self.count))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Collective, over the host."""
        return [value] if self._group is None else self._group.gather(value)

    def merge(self, own: list[tuple[int, T]]) -> list[T]:
        """Merge (sample number, result) of all ranks: results by sample number, on every rank. Collective."""
        numbered = [item for items in self.gather(own) for item in items]
        return [found for _, found in sorted(numbered, key=lambda item: item[0])]


class Dealt(Iterator[Sample]):
    """Iterates over this rank's samples and remembers their numbers, because unreadable samples will have no result.

    `samples`: this rank's samples, in order.
    """

    def __init__(self, samples: Iterable[Sample], dealer: Dealer) -> None:
        self._samples = iter(samples)
        self._dealer = dealer
        self._drawn = 0
        self._numbers: dict[int, int] = {}

    def __next__(self) -> Sample:
        sample = next(self._samples)
        self._numbers[id(sample)] = self._dealer.rank + self._drawn * self._dealer.count
        self._drawn += 1
        return sample

    def number(self, sample: Sample) -> int:
        """The number of a sample; it must be the object that this iterator returned."""
        return self._numbers[id(sample)]
