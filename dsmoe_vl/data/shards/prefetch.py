"""Remote shards are downloaded before they are read, so that readers seldom wait."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue

from dsmoe_vl.data.shards.index import Shard, ShardIndex
from dsmoe_vl.data.shards.remote import RemoteShards

_Wanted = SimpleQueue[tuple[RemoteShards, Shard] | None]


class Prefetcher:
    """Downloads announced shards in a thread, one after another. Does nothing for local shards.

    It only fills free room in the cache. Errors are left to the reader of the shard, who downloads it again. Can be
    pickled before its first use.
    """

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._indexes = indexes
        self._wanted: _Wanted | None = None  # exists once the thread runs

    def announce(self, source: int, shard: int) -> None:
        """The next block of this source will be read from this shard."""
        index = self._indexes[source]
        if index.remote is None:
            return
        if self._wanted is None:
            self._wanted = SimpleQueue()
            # A daemon: a worker that ends does not wait for a download. The kernel releases the lock.
            threading.Thread(target=_download_all, args=(self._wanted,), name="prefetch", daemon=True).start()
        self._wanted.put((index.remote, index.shards[shard]))

    def close(self) -> None:
        """End the thread after the shards that were announced. Does not wait for it."""
        if self._wanted is not None:
            self._wanted.put(None)
            self._wanted = None


def _download_all(wanted: _Wanted) -> None:
    while (announced := wanted.get()) is not None:
        remote, shard = announced
        remote.prefetch(shard.name, shard.bytes, shard.sha256)
