"""The order of training samples: a pure function of (seed, lane, position), whatever the number of ranks or workers.

The data is dealt to virtual readers, the lanes, whose number is fixed for the life of a run. Every source is an endless
sequence of blocks of nearby samples: epoch 0's blocks, permuted, then epoch 1's, permuted anew, and so on. Block g of
that sequence belongs to lane g % lanes. So every sample occurs once an epoch, and a lane starves in no source, however
small.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dsmoe_vl.data.shards.index import ShardIndex

_GOLDEN_RATIO = 0.6180339887498949


class SampleRef(NamedTuple):
    """Where a sample lies, and in which epoch of its source it is drawn."""

    source: int
    epoch: int
    shard: int
    sample: int


class SourceOrder:
    """The endless sequence of one source's blocks; shared by the lanes of a process, has no state."""

    def __init__(self, name: str, index: ShardIndex, lanes: int, shuffle_block: int, seed: int) -> None:
        """Blocks hold `shuffle_block` samples of one shard, fewer where an epoch could not give each lane a block."""
        self._size = max(1, min(shuffle_block, index.samples // lanes))
        self._samples = [shard.samples for shard in index.shards]
        blocks = [-(-samples // self._size) for samples in self._samples]
        self._ends = np.cumsum(blocks)  # block b of an epoch lies in the first shard whose end is beyond b
        self._blocks = int(self._ends[-1])
        self._seed = (seed, zlib.crc32(name.encode()))

    def block(self, number: int) -> tuple[int, list[tuple[int, int]]]:
        """Block `number` of the sequence: its epoch, and its shuffled (shard, sample) pairs."""
        epoch, position = divmod(number, self._blocks)
        block = int(_permutation((*self._seed, epoch), self._blocks)[position])
        shard = int(np.searchsorted(self._ends, block, side="right"))
        from_shard_end = int(self._ends[shard]) - block
        first = (-(-self._samples[shard] // self._size) - from_shard_end) * self._size
        count = min(self._size, self._samples[shard] - first)
        shuffled = np.random.default_rng((*self._seed, epoch, block)).permutation(count)
        return epoch, [(shard, first + int(i)) for i in shuffled]


class Lane:
    """One virtual reader: the endless, weighted mixture of its blocks of every source."""

    def __init__(
        self,
        lane: int,
        lanes: int,
        orders: Sequence[SourceOrder],
        weights: Sequence[float],
        announce: Callable[[int, int], None] | None = None,
    ) -> None:
        """`announce(source, shard)` is told, when a block begins, what the source's next block will read."""
        total = sum(weights)
        self._lane, self._lanes = lane, lanes
        self._orders = orders
        self._announce = announce
        self._weights = [weight / total for weight in weights]
        self._fingerprint = zlib.crc32(" ".join(f"{weight:.9g}" for weight in self._weights).encode())
        # Lanes start out of phase, so that the packs of one step do not all draw a rare source together.
        self._phases = [(lane * (i + 1) * _GOLDEN_RATIO) % 1.0 if weight else 0.0 for i, weight in enumerate(weights)]
        self._taken = [0] * len(orders)
        self._taken_before = [0] * len(orders)  # before the present weights
        self._cursors = [(0, 0)] * len(orders)  # blocks finished by this lane, samples taken of the next
        self._open: list[tuple[int, list[tuple[int, int]]] | None] = [None] * len(orders)

    def next(self) -> SampleRef:
        """The next sample, of the source that is furthest behind its weight."""
        taken = [now - before for now, before in zip(self._taken, self._taken_before, strict=True)]
        draws = sum(taken) + 1
        behind = [
            weight * draws - count + phase
            for weight, count, phase in zip(self._weights, taken, self._phases, strict=True)
        ]
        source = behind.index(max(behind))
        self._taken[source] += 1
        turn, offset = self._cursors[source]
        epoch, samples = block = self._open[source] or self._begin(source, turn)
        last = offset + 1 == len(samples)
        self._cursors[source] = (turn + 1, 0) if last else (turn, offset + 1)
        self._open[source] = None if last else block
        return SampleRef(source, epoch, *samples[offset])

    def _begin(self, source: int, turn: int) -> tuple[int, list[tuple[int, int]]]:
        order = self._orders[source]
        if self._announce is not None:
            _, following = order.block(self._lane + (turn + 1) * self._lanes)
            self._announce(source, following[0][0])
        return order.block(self._lane + turn * self._lanes)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue with the next sample; JSON."""
        return {
            "taken": list(self._taken),
            "cursors": [list(cursor) for cursor in self._cursors],
            "weights": self._fingerprint,
            "taken_before": list(self._taken_before),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where the lane was when `state` was taken.

        Weights that have changed since hold from here on: what was drawn by the old ones is not made up for.
        """
        self._taken = list(state["taken"])
        is_same = state.get("weights") == self._fingerprint  # older checkpoints do not say
        self._taken_before = list(state["taken_before"] if is_same else self._taken)
        self._cursors = [(turn, offset) for turn, offset in state["cursors"]]
        self._open = [None] * len(self._orders)


@lru_cache(maxsize=16)
def _permutation(seed: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)
