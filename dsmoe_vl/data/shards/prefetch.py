"""Remote shards on their way before they are needed, so that readers seldom wait for a download."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue

from dsmoe_vl.data.shards.index import Shard, ShardIndex
from dsmoe_vl.data.shards.remote import RemoteFolder

_Wanted = SimpleQueue[tuple[RemoteFolder, Shard] | None]


class Prefetcher:
    """Fetches announced shards in a thread of its own, one after the other; local ones cost nothing.

    It only fills the cache, as far as that has room. What goes wrong is left to the reader of the shard, who tries
    again and knows what it means. Can be pickled until it is used.
    """

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._indexes = indexes
        self._wanted: _Wanted | None = None  # the thread starts with the first

    def announce(self, source: int, shard: int) -> None:
        """The next block of this source is in this shard."""
        index = self._indexes[source]
        if index.remote is None:
            return
        if self._wanted is None:
            self._wanted = SimpleQueue()
            # A daemon: a worker that has to end does not wait for a download. The kernel frees its lock.
            threading.Thread(target=_fetch_all, args=(self._wanted,), name="prefetch", daemon=True).start()
        self._wanted.put((index.remote, index.shards[shard]))

    def close(self) -> None:
        """End the thread when it has done what was announced."""
        if self._wanted is not None:
            self._wanted.put(None)
            self._wanted = None


def _fetch_all(wanted: _Wanted) -> None:
    while (announced := wanted.get()) is not None:
        remote, shard = announced
        remote.fetch_ahead(shard.name, shard.bytes, shard.sha256)
