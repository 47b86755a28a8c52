"""The order of training samples: a pure function of (seed, lane, position) for any number of ranks and workers.

The data is divided among lanes, virtual readers whose number is fixed for a run. Every source is an endless sequence of
blocks of neighbouring samples: those of epoch 0 in random order, those of epoch 1 in another, and so on. Block g of the
sequence belongs to lane g % lanes. So every sample occurs once per epoch, and every lane gets samples of every source,
even of a small one.
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
    """The place of a sample, and the epoch of its source in which it is drawn."""

    source: int
    epoch: int
    shard: int
    sample: int


class SourceOrder:
    """The endless sequence of blocks of one source. Has no state; the lanes of a process share it."""

    def __init__(self, name: str, index: ShardIndex, lanes: int, shuffle_block: int, seed: int) -> None:
        """A block is `shuffle_block` samples of one shard, or fewer if an epoch had less than one block per lane."""
        self._size = max(1, min(shuffle_block, index.samples // lanes))
        self._samples = [shard.samples for shard in index.shards]
        blocks = [-(-samples // self._size) for samples in self._samples]
        self._ends = np.cumsum(blocks)  # block b of an epoch is in the first shard whose end is greater than b
        self._blocks = int(self._ends[-1])
        self._seed = (seed, zlib.crc32(name.encode()))

    def block(self, number: int) -> tuple[int, list[tuple[int, int]]]:
        """Block `number` of the sequence: its epoch, and its (shard, sample) pairs in random order."""
        epoch, position = divmod(number, self._blocks)
        block = int(_permutation((*self._seed, epoch), self._blocks)[position])
        shard = int(np.searchsorted(self._ends, block, side="right"))
        from_shard_end = int(self._ends[shard]) - block
        first = (-(-self._samples[shard] // self._size) - from_shard_end) * self._size
        count = min(self._size, self._samples[shard] - first)
        shuffled = np.random.default_rng((*self._seed, epoch, block)).permutation(count)
        return epoch, [(shard, first + int(i)) for i in shuffled]


class Lane:
    """A virtual reader: an endless weighted mixture of its blocks of all sources."""

    def __init__(
        self,
        lane: int,
        lanes: int,
        orders: Sequence[SourceOrder],
        weights: Sequence[float],
        announce: Callable[[int, int], None] | None = None,
    ) -> None:
        """`announce(source, shard)` is called when a block begins, with the shard of the source's next block."""
        total = sum(weights)
        self._lane, self._lanes = lane, lanes
        self._orders = orders
        self._announce = announce
        self._weights = [weight / total for weight in weights]
        self._fingerprint = zlib.crc32(" ".join(f"{weight:.9g}" for weight in self._weights).encode())
        # Lanes start at different phases, so that not all packs of a step draw from a rare source together.
        self._phases = [(lane * (i + 1) * _GOLDEN_RATIO) % 1.0 if weight else 0.0 for i, weight in enumerate(weights)]
        self._taken = [0] * len(orders)
        self._taken_before = [0] * len(orders)  # under earlier weights
        self._cursors = [(0, 0)] * len(orders)  # finished blocks of this lane, samples taken from the next one
        self._open: list[tuple[int, list[tuple[int, int]]] | None] = [None] * len(orders)

    def next(self) -> SampleRef:
        """The next sample, from the source that is furthest behind its weight."""
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
        """The position after the last sample, for `restore`; JSON."""
        return {
            "taken": list(self._taken),
            "cursors": [list(cursor) for cursor in self._cursors],
            "weights": self._fingerprint,
            "taken_before": list(self._taken_before),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at the position `state`.

        New weights apply from here on. Samples drawn under the old weights do not count towards them.
        """
        self._taken = list(state["taken"])
        is_same = state.get("weights") == self._fingerprint  # missing in older checkpoints
        self._taken_before = list(state["taken_before"] if is_same else self._taken)
        self._cursors = [(turn, offset) for turn, offset in state["cursors"]]
        self._open = [None] * len(self._orders)


@lru_cache(maxsize=16)
def _permutation(seed: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)
