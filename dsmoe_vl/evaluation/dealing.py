"""The samples of an evaluation dealt to ranks, and their results put together again in the samples' order.

Sample number i belongs to rank i % ranks: no sample is padded or met twice, whatever their number. Nothing is exchanged
while ranks work, so they may do so at their own pace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.parallel.ranks import Ranks

# Its module imports DeepSpeed, which takes seconds that an evaluation by one process can do without.
if TYPE_CHECKING:
    from dsmoe_vl.parallel.launch import HostGroup

T = TypeVar("T")


class Dealer:
    """Who evaluates which samples. Without a group, one process evaluates all."""

    def __init__(self, ranks: Ranks | None = None, group: HostGroup | None = None) -> None:
        assert group is not None or ranks is None or ranks.world_size == 1, "several ranks need a group"
        self.rank, self.count = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        self._group = group

    def own(self, limit: int) -> int:
        """How many of the first `limit` samples are this rank's."""
        return len(range(self.rank, limit, self.count))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Collective, over the host."""
        return [value] if self._group is None else self._group.gather(value)

    def merge(self, own: list[tuple[int, T]]) -> list[T]:
        """What every rank has found for samples of given numbers, in their order, on every rank. Collective."""
        numbered = [item for items in self.gather(own) for item in items]
        return [found for _, found in sorted(numbered, key=lambda item: item[0])]


class Dealt(Iterator[Sample]):
    """This rank's samples, of which it tells the numbers later: some may turn out to be unreadable, and have no result.

    `samples` are those that belong to the rank, in order.
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
        """The number of a sample that came from here and is still the same object."""
        return self._numbers[id(sample)]
