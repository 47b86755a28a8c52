"""Remote shards on their way before they are needed, so that readers seldom wait for a download."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from dsmoe_vl.data.shards import Shard, ShardIndex
from dsmoe_vl.errors import DataError, FetchError


class Prefetcher:
    """Fetches announced shards in a thread of its own, one after the other; local ones cost nothing.

    It only fills the cache. What goes wrong is left to the reader of the shard, who tries again and knows what it
    means, so that neither order nor errors of the data depend on who was faster. Can be pickled until it is used.
    """

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._indexes = indexes
        self._wanted: SimpleQueue[tuple[ShardIndex, Shard]] | None = None  # the thread starts with the first

    def announce(self, source: int, shard: int) -> None:
        """The next block of this source is in this shard."""
        index = self._indexes[source]
        if index.remote is None:
            return
        if self._wanted is None:
            self._wanted = SimpleQueue()
            # A daemon: a worker that has to end does not wait for a download. The kernel frees its lock.
            threading.Thread(target=_fetch_all, args=(self._wanted,), name="prefetch", daemon=True).start()
        self._wanted.put((index, index.shards[shard]))


def _fetch_all(wanted: SimpleQueue[Any]) -> None:
    while True:
        index, shard = wanted.get()
        with suppress(DataError, FetchError):
            index.remote.fetch(shard.name, shard.bytes, shard.sha256)
