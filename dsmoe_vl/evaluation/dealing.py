"""Distributes the samples of an evaluation over ranks, and merges the results in the order of the samples.

Sample number i belongs to rank i % ranks: no padding and no duplicates, for any number of samples. Ranks do not
communicate while they work, so each works at its own pace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError
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

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Collective, over the host."""
        return [value] if self._group is None else self._group.gather(value)

    def merge(self, own: list[tuple[int, T]]) -> list[T]:
        """Merge (sample number, result) of all ranks: results by sample number, on every rank. Collective."""
        numbered = [item for items in self.gather(own) for item in items]
        return [found for _, found in sorted(numbered, key=lambda item: item[0])]


class Dealt(Iterator[Sample]):
    """Iterates over this rank's samples and remembers their numbers, because some samples will have no result.

    `samples`: this rank's samples, in order; None for one that is passed over. `failed` is called with the number of a
    sample that turns out to be bad, the reason, and its key. `places`: the samples, and None for those passed over.
    """

    def __init__(
        self, samples: Iterable[Sample | None], dealer: Dealer, failed: Callable[[int, str, str], None]
    ) -> None:
        self._dealer, self._failed = dealer, failed
        self._numbers: dict[int, int] = {}
        self.places = self._numbered(samples)

    def __next__(self) -> Sample:
        return next(sample for sample in self.places if sample is not None)

    def bad(self, sample: Sample, error: DataError) -> None:
        """Called for a sample of this iterator that cannot be used after all."""
        self._failed(self.number(sample), str(error), sample.key)

    def _numbered(self, samples: Iterable[Sample | None]) -> Iterator[Sample | None]:
        for drawn, sample in enumerate(samples):
            if sample is not None:
                self._numbers[id(sample)] = self._dealer.rank + drawn * self._dealer.count
            yield sample

    def number(self, sample: Sample) -> int:
        """The number of a sample; it must be the object that this iterator returned."""
        return self._numbers[id(sample)]
