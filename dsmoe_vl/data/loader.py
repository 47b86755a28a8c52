"""Packs from worker processes, in one global order for every number of ranks and workers.

Pack n of the run (n = 0, 1, ...) comes from lane n % lanes. A step of G packs takes the next G of them; rank r takes
every ranks-th. With each pack travels its lane's state after it, so what a rank has consumed is all that a checkpoint
needs: packs that workers made ahead are made again.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch.utils.data import DataLoader

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.error_log import ErrorLog, ReadReport
from dsmoe_vl.data.pack import Packer, PackShape, collate
from dsmoe_vl.data.pack_stream import Delivery, Encode, PackStream, SampleReader, to_pack
from dsmoe_vl.data.position import check_order, merge_states, order_identity
from dsmoe_vl.data.segment import Pack
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.data.slots import PatchSlots
from dsmoe_vl.data.stream import SampleRef
from dsmoe_vl.errors import ConfigError, DataError

_Step = tuple[list[Delivery], list[Batch]]


class _Background:
    """Makes steps one after another in a thread for which the process does not wait when it ends.

    A worker that the system kills while it sends a pack leaves half of it, and whoever is reading that never returns.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[_Step], Callable[[], _Step]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="steps", daemon=True).start()

    def submit(self, make: Callable[[], _Step]) -> Future[_Step]:
        """Have `make` called when those before it are done."""
        made: Future[_Step] = Future()
        self._calls.put((made, make))
        return made

    def end(self) -> None:
        """End the thread once it is idle."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            made, make = call
            try:
                made.set_result(make())
            except BaseException as error:
                made.set_exception(error)
            del call, made, make  # while the thread waits it keeps no step alive


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
    ) -> None:
        """Bad samples are appended to the file `quarantine`, which is this rank's own.

        Raises ConfigError where lanes cannot be dealt evenly or there is nothing to draw from, DataError where shards
        are unusable, and FetchError where their server keeps failing. `encode` may raise DataError for a sample that
        it cannot use.
        """
        self._data, self._sources, self._encode = data, sources, encode
        self._shape = PackShape(data.pack_length, data.pack_patches, patch_size, merge)
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._micro_batch, self._packs_per_step = micro_batch, micro_batch * accumulation
        _check_lanes(data, ranks)
        _check_sources(sources)
        self._indexes = {source.name: _open(source, data) for source in sources}
        self._order = order_identity(data.lanes, data.shuffle_block, seed, self._indexes)
        self._packs = 0  # consumed, over all ranks
        self._lane_states: dict[str, Any] = {}
        self._report = ReadReport(quarantine)
        self._stream: Iterator[Delivery] | None = None
        self._thread: _Background | None = None
        self._making: Future[_Step] | None = None  # the step that the thread works at
        self._workers: list[BaseProcess] = []
        self._slots: PatchSlots | None = None
        self._closed = multiprocessing.RawValue(ctypes.c_bool, False)  # the workers read it; has no lock

    def __iter__(self) -> Iterator[list[Batch]]:
        self.close()
        self._stream = self._open_stream()
        self._thread = _Background() if self._data.workers else None
        step = self._begin_step()
        while self._stream is not None:
            deliveries, batches = step()
            self._account(deliveries)
            step = self._begin_step()
            yield batches

    def state_dict(self) -> dict[str, Any]:
        """This rank's position after the last step that was yielded; JSON."""
        lanes, epochs = dict(self._lane_states), dict(self._report.epochs)
        return {"order": self._order, "packs": self._packs, "lanes": lanes, "epochs": epochs}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of all ranks at one step, of however many. Takes effect at the next `iter()`.

        Raises CheckpointError where they do not belong together, or the data or a setting of its order has changed.
        """
        state = merge_states(states)
        check_order(state, self._order)
        self._packs = state["packs"]
        self._report.epochs = state["epochs"]
        first_lane = self._packs + self._rank
        self._lane_states = {
            lane: saved for lane, saved in state["lanes"].items() if (int(lane) - first_lane) % self._ranks == 0
        }

    def report(self) -> dict[str, int]:
        """Counts of this rank since it started and its epochs, as `ReadReport.values`; see `merge_reports`."""
        return self._report.values()

    def close(self) -> None:
        """End the worker processes; a running iteration ends too."""
        if self._thread is not None:
            self._thread.end()
        if self._making is not None:
            while wait([self._making], timeout=0.1).not_done and not any(worker.exitcode for worker in self._workers):
                pass  # a worker that ends while it sends would leave the thread waiting; one that was killed has
        self._closed.value = True  # ends the workers
        self._thread = self._making = self._stream = self._slots = None
        for worker in self._workers:
            worker.join()
        self._workers = []
        atexit.unregister(self.close)

    def _open_stream(self) -> Iterator[Delivery]:
        workers = self._data.workers
        # Each worker computes on one thread (torch's default). A whole step lies ready in this process.
        held = -(-self._micro_batch // workers) if workers else 0  # of a worker's packs, while they are flattened
        ahead = held + 1 if workers else None
        self._slots = PatchSlots(workers, held + 1, held, self._shape) if workers else None
        stream = PackStream(
            self._data,
            self._sources,
            self._indexes,
            self._encode,
            self._shape,
            self._seed,
            self._rank,
            self._ranks,
            self._packs,
            dict(self._lane_states),
            self._slots,
        )
        if workers:  # they ignore SIGTERM, so a process that ends without close() would wait for them for ever
            atexit.register(self.close)
        own = torch.Generator()  # a draw from the global one would set a resumed run apart from an unbroken one
        self._closed = multiprocessing.RawValue(ctypes.c_bool, False)
        others = multiprocessing.active_children()
        opened = iter(
            DataLoader(
                stream,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=ahead,
                generator=own,
                worker_init_fn=partial(_live_with_rank, self._closed),
            )
        )
        self._workers = [child for child in multiprocessing.active_children() if child not in others]
        return opened

    def _begin_step(self) -> Callable[[], _Step]:
        """What returns the next step. With workers, a thread receives and flattens it while the caller computes."""
        if self._thread is None:
            return self._make_step
        self._making = self._thread.submit(self._make_step)
        return self._making.result

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
            batches.append(_flattened(packs, arrived, slots))
        return deliveries, [_pinned(batch) for batch in batches] if torch.cuda.is_available() else batches

    def _account(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            self._report.add(delivery.counts)
            if delivery.failure:
                raise DataError(delivery.failure)
        for pack in (delivery.pack for delivery in deliveries if delivery.pack is not None):
            self._lane_states[str(pack.lane)] = pack.lane_state
        self._packs += self._packs_per_step * self._ranks


def evaluation_packs(
    data: DataConfig,
    source: SourceConfig,
    encode: Encode,
    patch_size: int,
    merge: int,
    rank: int = 0,
    ranks: int = 1,
    maximum: Callable[[int], int] = int,
) -> Iterator[Pack]:
    """One pass over `source`: every sample once over all ranks, the same number of packs on each.

    `maximum` reduces a number over the ranks and is called once before each pack; a rank that has run out yields packs
    without labels until all have. Raises DataError where too many samples are bad, and FetchError where remote storage
    keeps failing.
    """
    index = ShardIndex.load(source.path, data)
    shape = PackShape(data.pack_length, data.pack_patches, patch_size, merge)
    log = ErrorLog(data.max_bad_fraction, "data.evaluation")
    reader = SampleReader({source.name: index}, encode, shape, log)
    numbers = ((shard, sample) for shard, row in enumerate(index.shards) for sample in range(row.samples))
    refs = (SampleRef(0, 0, *number) for number in itertools.islice(numbers, rank, None, ranks))
    items = (item for ref in refs if (item := reader.read(ref)) is not None)
    packer = Packer(shape, data.lookahead)
    while True:
        chosen = packer.fill(lambda: next(items, None))
        if not maximum(len(chosen)):
            return
        yield to_pack(chosen, shape)


def _live_with_rank(closed: Any, _worker: int) -> None:
    """Make a worker process end when its loader is `closed` or its rank ends: not before, and not later.

    Launchers signal the whole process tree, but a rank that is asked to stop needs data to end its step. A worker that
    is left behind would hold the dead rank's connections open, and the other ranks would wait for it.
    """
    gc.freeze()  # what the rank left to be collected may have threads, which are not here and would be waited for
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(), closed), daemon=True).start()


def _end_with(parent: int, closed: Any) -> None:
    # Under a fork server, the default from Python 3.14 on, a worker is the child of a server that lives as long as its
    # children do. Under fork, a sibling that was forked later holds the pipe open that tells whether the rank is alive.
    rank = multiprocessing.parent_process()
    while os.getppid() == parent and (rank is None or rank.is_alive()) and not closed.value:
        time.sleep(0.2)
    os._exit(0)  # torch raises in the rank for a worker with another status


def _flattened(packs: list[Pack], arrived: list[Delivery], slots: PatchSlots | None) -> Batch:
    if slots is None:
        return collate(packs)
    for pack, delivery in zip(packs, arrived, strict=True):
        slots.restore(pack, delivery.worker, delivery.number)
    batch = collate(packs)
    for delivery in arrived:
        slots.check(delivery.worker, delivery.number)
    return batch


def _pinned(batch: Batch) -> Batch:
    """In page-locked memory, from where the copy to the device is asynchronous."""
    pinned: dict[str, Any] = {name: value.pin_memory() for name, value in vars(batch).items() if torch.is_tensor(value)}
    return replace(batch, **pinned)


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
