"""Packs of a held-out source."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.error_log import ErrorLog
from dsmoe_vl.data.pack import Packer
from dsmoe_vl.data.pack_shape import PackShape, SpeechShape
from dsmoe_vl.data.pack_stream import Encode, SampleReader, to_pack
from dsmoe_vl.data.segment import Pack
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.data.stream import SampleRef


def held_out_packs(
    data: DataConfig,
    source: SourceConfig,
    encode: Encode,
    patch_size: int,
    merge: int,
    rank: int = 0,
    ranks: int = 1,
    maximum: Callable[[int], int] = int,
    speech: SpeechShape | None = None,
) -> Iterator[Pack]:
    """One pass over `source`: every sample once over all ranks, and the same number of packs on each rank.

    `maximum` reduces a number over the ranks; it is called once before each pack. A rank that has no samples left
    yields packs without labels until all ranks have none. Raises DataError if too many samples are bad, FetchError if
    remote storage keeps failing.
    """
    index = ShardIndex.load(source.path, data)
    shape = PackShape(data.pack_length, data.pack_patches, patch_size, merge, speech)
    log = ErrorLog(data.max_bad_fraction, "data.evaluation")
    reader = SampleReader((source,), {source.name: index}, encode, shape, log)
    refs = (SampleRef(0, 0, *place) for place in itertools.islice(index.places(), rank, None, ranks))
    items = (item for ref in refs if (item := reader.read(ref)) is not None)
    packer = Packer(shape, data.lookahead)
    while True:
        chosen = packer.fill(lambda: next(items, None))
        if not maximum(len(chosen)):
            return
        yield to_pack(chosen, shape)
