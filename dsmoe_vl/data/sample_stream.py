"""The stream of samples for other trainers: in a fixed order, each once an epoch, from a position that can be saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.config.source_map import map_hashes
from dsmoe_vl.data.error_log import BadSample, ErrorLog, ReadReport
from dsmoe_vl.data.position import changed_contents, check_order, contents_of_sources, order_identity
from dsmoe_vl.data.shards.index import ShardIndex, read_all_files
from dsmoe_vl.data.stream import Lane, SourceOrder
from dsmoe_vl.errors import CheckpointError, ConfigError, DataError

_DEFAULTS = DataConfig()


class SampleStream:
    """Samples as dicts, as WebDataset has them: `{"__key__": KEY, "__url__": the tar, "jpg": bytes, ...}`, without end.

    The sources are mixed by their weights, and every sample of a source occurs once in each of its epochs, over all
    ranks together. The position is saved by `state_dict`; any number of ranks that divides the lanes may continue it.
    Samples that cannot be read are left out and counted, as in training.
    """

    def __init__(
        self, sources: Sequence[SourceConfig | str | Path], rank: int = 0, ranks: int = 1, seed: int = 0,
        data: DataConfig = _DEFAULTS,
    ) -> None:  # fmt: skip
        """rank of ranks: this reader; with worker processes, each is one. sources: those of a recipe, or folders of
        shards. data: lanes, shuffle_block, temperature and the limits of samples; the rest of it is not used.

        Raises ConfigError if lanes cannot be dealt evenly, DataError and FetchError as `ShardIndex.load`.
        """
        if data.lanes % ranks or not 0 <= rank < ranks:
            raise ConfigError(f"rank {rank} of {ranks}: the ranks must divide data.lanes = {data.lanes}")
        self._sources = [one if isinstance(one, SourceConfig) else SourceConfig.at(one) for one in sources]
        self._indexes = {source.name: ShardIndex.load(source.path, data) for source in self._sources}
        if len(self._indexes) < len(self._sources) or not self._sources:
            raise ConfigError(f"{len(self._sources)} sources: give at least one, and each a name of its own")
        hashes = map_hashes(self._sources)
        maps = {source.name: hashes[source.map] for source in self._sources if source.map}
        self._order = order_identity(data.lanes, data.shuffle_block, seed, self._indexes, maps)
        orders = [
            SourceOrder(name, index, data.lanes, data.shuffle_block, seed) for name, index in self._indexes.items()
        ]
        weights = [source.weight ** (1 / data.temperature) for source in self._sources]
        self._lanes = {lane: Lane(lane, data.lanes, orders, weights) for lane in range(rank, data.lanes, ranks)}
        self._ranks, self._turn = ranks, 0  # of this rank's lanes, whose is next
        self._log, self._report = ErrorLog(data.max_bad_fraction, "sources"), ReadReport(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Continues after the last sample. Raises DataError when too many are bad."""
        lanes = list(self._lanes.values())
        while True:
            ref = lanes[self._turn].next()
            self._turn = (self._turn + 1) % len(lanes)
            source = self._sources[ref.source]
            index = self._indexes[source.name]
            try:
                sample = read_all_files(index, ref.shard, ref.sample, source)
            except DataError as error:
                shard = index.shards[ref.shard].name
                self._log.bad(BadSample(source.name, shard, ref.sample, ref.epoch, str(error)))
                continue
            self._log.good(source.name, ref.epoch)
            yield sample

    def report(self) -> dict[str, int]:
        """What this rank has read since it started, as `Loader.report`."""
        self._report.add(self._log.drain())
        return self._report.values()

    def state_dict(self) -> dict[str, Any]:
        """This rank's position after the last sample; JSON."""
        lanes = {str(number): lane.state() for number, lane in self._lanes.items()}
        contents = contents_of_sources(self._indexes)
        return {"order": self._order, "ranks": self._ranks, "turn": self._turn, "lanes": lanes, "contents": contents}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of all ranks, however many they were.

        As many ranks as before see the same samples as without the interruption; another number sees the rest of the
        epoch once too, in another order. Warns of shards that were written anew. Raises CheckpointError if the sources
        or a setting of their order has changed, or if the states are not those of all ranks.
        """
        known = {lane: state for one in states for lane, state in one["lanes"].items()}
        for state in states:
            check_order(state, self._order)
        missing = [number for number in self._lanes if str(number) not in known]
        if missing:
            raise CheckpointError(f"the states have no lane {missing[0]}: give those of all ranks")
        for number, lane in self._lanes.items():
            lane.restore(known[str(number)])
        for note in changed_contents(states[0].get("contents", {}), contents_of_sources(self._indexes)):
            warnings.warn(note, stacklevel=2)
        same = [one["turn"] for one in states if one["ranks"] == self._ranks and one["lanes"].keys() == self._own()]
        self._turn = same[0] if same else 0

    def _own(self) -> set[str]:
        return {str(number) for number in self._lanes}
