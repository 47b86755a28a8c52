"""A rank's training batches, in one global order for every number of ranks and workers.

Pack n of the run (n = 0, 1, ...) comes from lane n % lanes. A step takes the next packs; rank r of R takes packs
r, r + R, ... of them. Each pack carries its lane's state after it. A checkpoint saves the states of the packs that were
consumed; packs that workers made ahead are made again.
"""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.config.source_map import map_hashes
from dsmoe_vl.data.background import BackgroundThread
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.error_log import ReadReport
from dsmoe_vl.data.last_read import LastRead
from dsmoe_vl.data.pack import collate
from dsmoe_vl.data.pack_shape import PackShape, SpeechShape
from dsmoe_vl.data.pack_stream import Delivery, Encode, PackStream
from dsmoe_vl.data.position import changed_contents, check_order, contents_of_sources, merge_states, order_identity
from dsmoe_vl.data.segment import Pack
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.data.slots import PatchSlots
from dsmoe_vl.data.source_map import load_map
from dsmoe_vl.data.workers import WorkerProcesses
from dsmoe_vl.errors import ConfigError, DataError

_Step = tuple[list[Delivery], list[Batch]]


class Loader:
    """The training data of one rank.

    Iterating yields one optimizer step's batches: a list of `accumulation` batches of `micro_batch` packs. It never
    ends; a new iteration continues after the last step that was yielded.
    """

    def __init__(
        self,
        data: DataConfig,
        sources: tuple[SourceConfig, ...],
        encode: Encode,
        patch_size: int,
        merge: int,
        seed: int,
        rank: int,
        ranks: int,
        micro_batch: int,
        accumulation: int,
        quarantine: Path | None = None,
        speech: SpeechShape | None = None,
    ) -> None:
        """`encode` may raise DataError for a sample that it cannot use. Bad samples are appended to the file
        `quarantine`, one file per rank.

        Raises ConfigError if lanes cannot be dealt evenly or there is no source, DataError if shards are unusable,
        FetchError if their server keeps failing.
        """
        self._data, self._sources, self._encode = data, sources, encode
        self._shape = PackShape(data.pack_length, data.pack_patches, patch_size, merge, speech)
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._micro_batch, self._packs_per_step = micro_batch, micro_batch * accumulation
        _check_lanes(data, ranks)
        _check_sources(sources)
        self.indexes = {source.name: _open(source, data) for source in sources}
        for source in sources:
            if source.map:  # before there are workers: an error in the user's module is one of the start
                load_map(source.map)
        hashes = map_hashes(sources)
        maps = {source.name: hashes[source.map] for source in sources if source.map}
        self._order = order_identity(data.lanes, data.shuffle_block, seed, self.indexes, maps)
        self._packs = 0  # consumed, over all ranks
        self._lane_states: dict[str, Any] = {}
        self._report = ReadReport(quarantine)
        self._stream: Iterator[Delivery] | None = None
        self._last = LastRead(max(1, data.workers), list(self.indexes.values()))
        # With worker processes only:
        self._workers: WorkerProcesses[Delivery] | None = None
        self._slots: PatchSlots | None = None
        self._thread: BackgroundThread[_Step] | None = None
        self._pending: Future[_Step] | None = None  # the step that the thread is working on

    def __iter__(self) -> Iterator[list[Batch]]:
        """Starts the workers at once: those that are forked later keep copies of what the rank has made since."""
        self.close()
        self._stream = self._open_stream()
        self._thread = BackgroundThread() if self._data.workers else None
        return self._steps(self._begin_step())

    def _steps(self, step: Callable[[], _Step]) -> Iterator[list[Batch]]:
        while self._stream is not None:
            deliveries, batches = step()
            self._account(deliveries)
            step = self._begin_step()
            yield batches

    def state_dict(self) -> dict[str, Any]:
        """This rank's position after the last step that was yielded; JSON."""
        lanes, epochs = dict(self._lane_states), dict(self._report.epochs)
        contents = contents_of_sources(self.indexes)
        return {"order": self._order, "packs": self._packs, "lanes": lanes, "epochs": epochs, "contents": contents}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> list[str]:
        """Continue from the states of all ranks at one step, however many they were. Takes effect at the next `iter()`.
        Returns notes about shards that have changed since.

        Raises CheckpointError if they do not belong together, or if the data or a setting of its order has changed.
        """
        state = merge_states(states)
        check_order(state, self._order)
        self._packs = state["packs"]
        self._report.epochs = state["epochs"]
        first_lane = self._packs + self._rank
        self._lane_states = {
            lane: saved for lane, saved in state["lanes"].items() if (int(lane) - first_lane) % self._ranks == 0
        }
        return changed_contents(state["contents"], contents_of_sources(self.indexes))

    def report(self) -> dict[str, int]:
        """`ReadReport.values`: this rank's counts since it started, and its epochs. See `merge_reports`."""
        return self._report.values()

    def waits_for(self) -> str:
        """What the next step is waiting for, in words; "" if for no worker. Any thread may call it."""
        if not self._data.workers:
            last = self._last.describe(0)
            return f"it reads its data itself, last {last}" if last else ""
        late = self._workers.late() if self._workers is not None else None
        if late is None:
            return ""
        last = self._last.describe(late.worker)
        return (
            f"worker {late.worker} of rank {self._rank} (pid {late.pid}) has sent nothing for {late.seconds:.0f} s"
            f"{': a signal has stopped it' if late.is_stopped else ''}{f'; it was reading {last}' if last else ''}"
        )

    def close(self) -> None:
        """End the worker processes; a running iteration ends too."""
        if self._thread is not None:
            self._thread.close()
        if self._workers is not None:
            if self._pending is not None:
                # The thread would hang if a worker ended in the middle of sending. After a worker was killed it may
                # hang already.
                while wait([self._pending], timeout=0.1).not_done and not self._workers.has_failed:
                    pass
            self._workers.close()
        self._stream = self._workers = self._slots = self._thread = self._pending = None
        atexit.unregister(self.close)

    def _open_stream(self) -> Iterator[Delivery]:
        workers = self._data.workers
        held = -(-self._micro_batch // workers) if workers else 0  # packs of one worker in a batch that is collated
        ahead = held + 1
        self._slots = PatchSlots(workers, ahead, held, self._shape) if workers else None
        stream = PackStream(
            self._data,
            self._sources,
            self.indexes,
            self._encode,
            self._shape,
            self._seed,
            self._rank,
            self._ranks,
            self._packs,
            dict(self._lane_states),
            self._slots,
            self._last,
        )
        if not workers:
            return iter(stream)
        atexit.register(self.close)  # multiprocessing would wait for ever for workers that ignore its SIGTERM
        self._workers = WorkerProcesses(stream, workers, ahead)
        return self._workers

    def _begin_step(self) -> Callable[[], _Step]:
        """A function that returns the next step. With workers, a thread prepares the step while the caller computes."""
        if self._thread is None:
            return self._make_step
        self._pending = self._thread.submit(self._make_step)
        return self._pending.result

    def _make_step(self) -> _Step:
        assert self._stream is not None
        stream, slots = self._stream, self._slots
        deliveries: list[Delivery] = []
        batches: list[Batch] = []
        while len(deliveries) < self._packs_per_step:
            arrived = list(itertools.islice(stream, self._micro_batch))
            deliveries += arrived
            packs = [delivery.pack for delivery in arrived if delivery.pack is not None]
            if len(packs) < self._micro_batch:
                return deliveries, []
            batches.append(_collated(packs, arrived, slots))
        return deliveries, [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    def _account(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            self._report.add(delivery.counts)
            if delivery.failure:
                raise DataError(delivery.failure)
        for pack in (delivery.pack for delivery in deliveries if delivery.pack is not None):
            self._lane_states[str(pack.lane)] = pack.lane_state
        self._packs += self._packs_per_step * self._ranks


def _collated(packs: list[Pack], arrived: list[Delivery], slots: PatchSlots | None) -> Batch:
    if slots is None:
        return collate(packs)
    for pack, delivery in zip(packs, arrived, strict=True):
        slots.restore(pack, delivery.worker, delivery.number)
    batch = collate(packs)
    for delivery in arrived:
        slots.check(delivery.worker, delivery.number)
    return batch


def _open(source: SourceConfig, data: DataConfig) -> ShardIndex:
    try:
        return ShardIndex.load(source.path, data)
    except DataError as error:
        raise DataError(f"data.sources, {source.name}: {error}") from error


def _check_lanes(data: DataConfig, ranks: int) -> None:
    readers = ranks * max(1, data.workers)
    if data.lanes % readers:
        raise ConfigError(
            f"data.lanes = {data.lanes} is not a multiple of {ranks} data-parallel ranks x {max(1, data.workers)} "
            f"workers; set data.lanes to {-(-data.lanes // readers) * readers}, or change data.workers"
        )


def _check_sources(sources: tuple[SourceConfig, ...]) -> None:
    names = [source.name for source in sources]
    if not sources or len(set(names)) < len(names):
        raise ConfigError(f"data.sources must have at least one source and unique names, has {names}")
    for source in sources:
        if not source.weight > 0:
            raise ConfigError(
                f"data.sources: weight of {source.name} is {source.weight}, must be above 0; or remove it"
            )
