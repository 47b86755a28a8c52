"""Local shards compared with their manifest while a run reads them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue

from dsmoe_vl.data.shards.index import INDEX_NAME, ShardIndex

_CHUNK = 2**20  # bytes read at once


class ShardVerifier:
    """Hashes the local shards of all sources once, in a thread that reads at most `mib_per_second`.

    A shard that was overwritten by another of the same size has other samples under the same numbers. Its size does not
    show that, and reading it would not either. Remote shards are hashed when they are fetched.
    """

    def __init__(self, indexes: Mapping[str, ShardIndex], mib_per_second: float) -> None:
        """`indexes` by source name. With a rate of 0 nothing is hashed."""
        self._local = {name: index for name, index in indexes.items() if index.remote is None}
        self._rate = mib_per_second * 2**20
        self._found: SimpleQueue[str] = SimpleQueue()
        self._closed = threading.Event()
        for name, index in self._local.items():
            if unlisted := unlisted_tars(index):
                self._found.put(
                    f"source {name}: {index.folder} has {len(unlisted)} tars that {INDEX_NAME} does not name, such as "
                    f"{unlisted[0]}; they are not read"
                )
        if self._rate:
            # A daemon: the end of the run does not wait for it.
            threading.Thread(target=self._hash_all, name="verify shards", daemon=True).start()

    def findings(self) -> list[str]:
        """What was found since the last call, one sentence each."""
        found: list[str] = []
        while True:
            try:
                found.append(self._found.get_nowait())
            except Empty:
                return found

    def close(self) -> None:
        """End the thread soon."""
        self._closed.set()

    def _hash_all(self) -> None:
        for name, index in self._local.items():
            for shard in index.shards:
                if self._closed.is_set():
                    return
                path = index.folder / shard.name
                try:
                    if shard.sha256 and self._sha256(path) not in ("", shard.sha256):
                        self._found.put(
                            f"source {name}: {path} was overwritten since {INDEX_NAME} was written (its sha256 "
                            "differs): copy the shard again, or write the shards anew and start a new run"
                        )
                except OSError as error:
                    self._found.put(f"source {name}: {path} cannot be read any more: {error.strerror}")

    def _sha256(self, path: Path) -> str:
        """The hash of a file; "" if the run ends meanwhile."""
        digest = hashlib.sha256()
        for chunk in self._throttled(path):
            digest.update(chunk)
        return "" if self._closed.is_set() else digest.hexdigest()

    def _throttled(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            while not self._closed.is_set() and (chunk := file.read(_CHUNK)):
                started = time.monotonic()
                yield chunk
                self._closed.wait(max(0.0, len(chunk) / self._rate - (time.monotonic() - started)))


def unlisted_tars(index: ShardIndex) -> list[str]:
    """Names of the tars in a local folder that its manifest does not name, sorted."""
    if not (index.folder / INDEX_NAME).is_file():
        return []
    named = {shard.name for shard in index.shards}
    return sorted(path.name for path in index.folder.glob("*.tar") if path.name not in named)
