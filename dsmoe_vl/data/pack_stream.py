"""The packs of one rank, made in its worker processes or in the rank itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.error_log import BadSample, ErrorLog, ReadCounts
from dsmoe_vl.data.last_read import LastRead
from dsmoe_vl.data.pack import Encoded, Packer, assemble, encoded
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Pack, Segment
from dsmoe_vl.data.shards.index import ShardIndex, read_sample
from dsmoe_vl.data.shards.prefetch import Prefetcher
from dsmoe_vl.data.slots import PatchSlots
from dsmoe_vl.data.stream import Lane, SampleRef, SourceOrder
from dsmoe_vl.errors import DataError, FetchError

Encode = Callable[[Sample], list[Segment]]
_UNHEARD = "recordings not used: the model has no [model.speech]"


@dataclass(frozen=True)
class Delivery:
    """What a worker sends: its pack number `number` and the counts of what it read, or the message of a `failure`."""

    counts: ReadCounts
    worker: int
    number: int
    pack: Pack | None = None
    failure: str = ""


class SampleReader:
    """Reads and encodes samples by reference, and logs them."""

    def __init__(
        self,
        sources: tuple[SourceConfig, ...],
        indexes: dict[str, ShardIndex],
        encode: Encode,
        shape: PackShape,
        log: ErrorLog,
        last: LastRead | None = None,
        worker: int = 0,
    ) -> None:
        """`indexes`: by name of the source. `last`: where this `worker` notes what it reads."""
        self._sources = [(source, indexes[source.name]) for source in sources]
        self._encode = encode
        self._shape = shape
        self._log = log
        self._last, self._worker = last, worker

    @property
    def sources(self) -> int:
        return len(self._sources)

    def read(self, ref: SampleRef) -> Encoded | None:
        """The sample, or None for a bad one, which is logged. Raises DataError when too many are bad."""
        source, index = self._sources[ref.source]
        key = ""
        if self._last is not None:
            self._last.begin(self._worker, ref)
        try:
            sample = read_sample(index, ref.shard, ref.sample, source, ref.epoch)
            key = sample.key
            if self._last is not None:
                self._last.found(self._worker, key)
            item = encoded(ref, key, self._encode(sample), self._shape)
        except DataError as error:
            shard = index.shards[ref.shard].name
            self._log.bad(BadSample(source.name, shard, ref.sample, ref.epoch, str(error), key))
            return None
        unheard = () if sample.recording is None or self._shape.speech is not None else (_UNHEARD,)
        self._log.good(source.name, ref.epoch, (*contents_of(sample).flaws, *unheard))
        return item

    def resume(self, lane_state: dict[str, Any]) -> None:
        """Count what a lane had read up to its state towards the error budget."""
        names = [source.name for source, _ in self._sources]
        taken = lane_state["taken"]
        bad = lane_state.get("bad", [0] * len(taken))  # missing in older checkpoints
        self._log.resume(dict(zip(names, taken, strict=True)), dict(zip(names, bad, strict=True)))


class _LanePacker:
    """Makes the packs of one lane, without end; each carries the lane's state after it."""

    def __init__(self, number: int, lane: Lane, reader: SampleReader, packer: Packer, shape: PackShape) -> None:
        self._number = number
        self._lane = lane
        self._reader = reader
        self._packer = packer
        self._shape = shape
        self._bad = [0] * reader.sources  # samples, by source

    def restore(self, state: dict[str, Any]) -> None:
        self._lane.restore(state)
        self._bad = list(state.get("bad", self._bad))
        waiting = [self._read(SampleRef(*ref)) for ref in state["pending"]]
        self._packer.pending = [item for item in waiting if item is not None]

    def next(self) -> Pack:
        pack = to_pack(self._packer.fill(self._draw), self._shape)
        pack.lane = self._number
        pending = [list(item.ref) for item in self._packer.pending]
        pack.lane_state = {**self._lane.state(), "bad": list(self._bad), "pending": pending}
        return pack

    def _draw(self) -> Encoded:
        while (item := self._read(self._lane.next())) is None:
            pass
        return item

    def _read(self, ref: SampleRef) -> Encoded | None:
        item = self._reader.read(ref)
        if item is None:
            self._bad[ref.source] += 1
        return item


class PackStream(IterableDataset[Delivery]):
    """The packs of one rank, from pack number `start` of the run on. With W workers, each makes every W-th of them."""

    def __init__(
        self,
        data: DataConfig,
        sources: tuple[SourceConfig, ...],
        indexes: dict[str, ShardIndex],
        encode: Encode,
        shape: PackShape,
        seed: int,
        rank: int,
        ranks: int,
        start: int,
        lane_states: dict[str, Any],
        slots: PatchSlots | None,
        last: LastRead,
    ) -> None:
        """With `slots`, patches travel in shared memory instead of in the packs. `last`: a row for each worker."""
        self._data, self._sources, self._indexes = data, sources, indexes
        self._encode, self._shape, self._seed = encode, shape, seed
        self._rank, self._ranks = rank, ranks
        self._start, self._lane_states = start, lane_states
        self._slots, self._last = slots, last
        self._prefetcher = Prefetcher(list(indexes.values()))

    def __iter__(self) -> Iterator[Delivery]:
        return _RepeatFailure(self._deliveries())

    def _deliveries(self) -> Iterator[Delivery]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        log = ErrorLog(self._data.max_bad_fraction)
        reader = SampleReader(self._sources, self._indexes, self._encode, self._shape, log, self._last, own)
        orders = [
            SourceOrder(name, index, self._data.lanes, self._data.shuffle_block, self._seed)
            for name, index in self._indexes.items()
        ]
        lanes: dict[int, _LanePacker] = {}
        begin, every = self._start + self._rank + own * self._ranks, self._ranks * workers
        for name, state in self._lane_states.items():
            if (int(name) - begin) % every == 0:  # a lane of this worker
                reader.resume(state)
        number = 0
        try:
            for number, n in enumerate(itertools.count(begin, every)):
                lane = n % self._data.lanes
                if lane not in lanes:
                    lanes[lane] = self._open_lane(lane, orders, reader)
                pack = lanes[lane].next()
                if self._slots is not None:
                    self._slots.store(pack, own, number)
                yield Delivery(log.drain(), own, number, pack)
        except (DataError, FetchError) as error:
            yield Delivery(log.drain(), own, number, failure=str(error))
        finally:
            self._prefetcher.close()

    def _weights(self) -> list[float]:
        return [source.weight ** (1 / self._data.temperature) for source in self._sources]

    def _open_lane(self, number: int, orders: list[SourceOrder], reader: SampleReader) -> _LanePacker:
        lane = Lane(number, self._data.lanes, orders, self._weights(), self._prefetcher.announce)
        packs = _LanePacker(number, lane, reader, Packer(self._shape, self._data.lookahead), self._shape)
        if str(number) in self._lane_states:
            packs.restore(self._lane_states[str(number)])
        return packs


class _RepeatFailure:
    """Deliveries; after a failure or an error, the same one again at every call.

    If the iterator ended, torch would give its worker's turns to the others, which would then overwrite slots that the
    rank still reads.
    """

    def __init__(self, deliveries: Iterator[Delivery]) -> None:
        self._deliveries = deliveries
        self._failed: Delivery | Exception | None = None

    def __iter__(self) -> Iterator[Delivery]:
        return self

    def __next__(self) -> Delivery:
        if isinstance(self._failed, Exception):
            raise self._failed
        if self._failed is not None:
            return self._failed
        try:
            delivery = next(self._deliveries)
        except Exception as error:
            self._failed = error
            raise
        if delivery.failure:
            self._failed = delivery
        return delivery


def to_pack(items: list[Encoded], shape: PackShape) -> Pack:
    """The samples of one pack, assembled."""
    segments = [segment for item in items for segment in item.segments]
    return assemble(segments, shape, [item.key for item in items])
