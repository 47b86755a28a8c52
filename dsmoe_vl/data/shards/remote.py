"""Remote folders of shards: each shard is downloaded whole, once per host, into a cache that processes and runs share.

    CACHE/FOLDER/SHARD-NAME      hashes of the folder's URL and of the shard, so that a changed shard is another file
    CACHE/locks/FOLDER-SHARD     held by the process that downloads it

A shard that cannot be had is a matter of the data: a DataError, remembered for as long as the folder is open. A server
that does not answer, or a cache that cannot be written, says nothing about the data and would change their order: after
some patience it is a FetchError, which ends the run.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from dsmoe_vl.config.recipe import PIPE, DataConfig
from dsmoe_vl.data.shards.download import PermanentFailure, TransientFailure, blocks, file_url, without_query
from dsmoe_vl.errors import ConfigError, DataError, FetchError
from dsmoe_vl.files import PARTIAL, replacing

_SILENCE = 30.0  # seconds without a byte that are taken for a failure
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds between attempts; doubles
_POLL = 0.05  # seconds between looks at a lock that another process holds
_LIFELESS = 180.0  # seconds without a sign of life after which such a process is not waited for
_ABANDONED = 3600.0  # seconds after its last byte at which the remains of a download are removed
_SOON = 600.0  # seconds; who removes a shard that was read so recently has too small a cache
_HEX = 16  # digits of a hash in a file name
# Only what has been put there is ever removed, whatever else lies in the folder.
_CACHED = "[0-9a-f]" * _HEX + "/" + "[0-9a-f]" * _HEX + "-*"

T = TypeVar("T")
_log = logging.getLogger(__name__)


class _Mismatch(TransientFailure):
    """A whole file, but not the one that the manifest describes."""


class _Cached(NamedTuple):
    used: float  # seconds since 1970
    size: int
    path: Path


class RemoteFolder:
    """A folder of shards behind a URL or a command, and its part of the cache; can be pickled."""

    def __init__(self, url: str, data: DataConfig) -> None:
        """Nothing is read yet. Raises ConfigError for a command where `data.allow_pipe` does not allow any."""
        if url.startswith(PIPE) and not data.allow_pipe:
            raise ConfigError(
                f'"{url}" runs a shell command, which only a recipe with data.allow_pipe = true may do: set it, or '
                "copy the shards to a folder"
            )
        self.name = without_query(url)  # for messages
        self._url = url
        self._data = data
        self._cache = Path(data.cache).expanduser()
        key = hashlib.sha256(self.name.rstrip("/").encode()).hexdigest()[:_HEX]
        self.folder = self._cache / key  # where its shards are cached
        self._limit = data.cache_gib * 2**30 or math.inf  # bytes
        self._silence = min(_SILENCE, data.fetch_patience_seconds)
        self._lost: dict[Path, str] = {}  # why; they are not tried again
        self._lost_ahead: set[Path] = set()  # are not tried ahead again
        self._has_warned = False

    def read(self, name: str) -> bytes:
        """A small file as it is now; it is not cached.

        Raises DataError where there is none, and FetchError where the server keeps failing.
        """
        try:
            url = file_url(self._url, name)
            return self._persist(url, lambda: b"".join(blocks(url, self._silence)))
        except PermanentFailure as error:
            raise DataError(
                f"{self.name}: {name} cannot be fetched: {error}; check the source's path: a remote "
                f"folder needs {name} beside its shards, as `python -m data_tools.convert` writes it"
            ) from error

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """The local copy of a shard of `size` bytes, downloaded if it is not there; marks it as used.

        Another process may remove it at any time, to make room. Raises DataError where it cannot be had, and
        FetchError where the server keeps failing or the cache cannot be written.
        """
        path = self._place(name, sha256)
        if path in self._lost:
            raise DataError(self._lost[path])
        try:
            if not _use(path, size):
                self._download(path, name, size, sha256)
        except PermanentFailure as error:
            self._lost[path] = f"shard cannot be fetched: {self.name}: {name}: {error}"
            raise DataError(self._lost[path]) from error
        except OSError as error:  # a transport's are failures by now
            raise FetchError(
                f"data.cache = {self._data.cache}: {path} cannot be kept there: {error}; make room, lower "
                f"data.cache_gib = {self._data.cache_gib}, or choose another folder"
            ) from error
        return path

    def fetch_ahead(self, name: str, size: int, sha256: str) -> None:
        """As `fetch`, but without an error, and only where the cache has room: what is read now must stay in it."""
        path = self._place(name, sha256)
        if path in self._lost or path in self._lost_ahead or path.exists():
            return
        try:
            if sum(one.size for one in self._cached()) + size <= self._limit:
                self._download(path, name, size, sha256)
        except (PermanentFailure, FetchError, OSError):
            self._lost_ahead.add(path)

    def _place(self, name: str, sha256: str) -> Path:
        return self.folder / f"{sha256[:_HEX]}-{name}"

    def _download(self, path: Path, name: str, size: int, sha256: str) -> None:
        url = file_url(self._url, name)
        lock = self._cache / "locks" / f"{self.folder.name}-{sha256[:_HEX]}"
        for folder in (path.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _turn(lock) as failing_since:
            if not _use(path, size):  # another process may have been faster
                self._persist(url, lambda: self._store(url, path, lock, size, sha256), failing_since)
                self._trim(path)

    def _store(self, url: str, path: Path, lock: Path, size: int, sha256: str) -> None:
        """One attempt to download a shard to `path`. Signs of life go to the modification time of `lock`."""
        os.utime(lock)
        received, digest = 0, hashlib.sha256()
        with replacing(path) as partial:
            partial.touch(0o600)  # the folder may be private
            with partial.open("wb") as file, closing(blocks(url, self._silence, size)) as source:
                for block in source:
                    os.utime(lock)
                    received += len(block)
                    if received > size:
                        raise _Mismatch(f"more than the {size} bytes of the manifest")
                    file.write(block)
                    digest.update(block)
            if received < size:
                raise _Mismatch(f"{received} bytes, not the {size} of the manifest")
            if digest.hexdigest() != sha256:
                raise _Mismatch(f"sha256 {digest.hexdigest()}, not {sha256} as in the manifest")

    def _persist(self, url: str, attempt: Callable[[], T], failing_since: float | None = None) -> T:
        """`attempt` until it goes well. Raises FetchError when it has failed for `data.fetch_patience_seconds`.

        `failing_since` (monotonic seconds): when another process began to fail. Those that wait for the same server
        then end with it, and not one after the other.
        """
        patience = self._data.fetch_patience_seconds
        jitter = random.Random()  # its own: the global state belongs to the run
        attempts = mismatches = 0
        while True:
            attempts += 1
            try:
                return attempt()
            except TransientFailure as error:
                if isinstance(error, _Mismatch):  # once may be a cache on the way, which another try gets past
                    mismatches += 1
                    if mismatches == 2:
                        raise PermanentFailure(f"twice {error}") from error
                    continue
                now = time.monotonic()
                failing_since = now if failing_since is None else failing_since
                left = failing_since + patience - now
                if left <= 0:
                    raise FetchError(
                        f"{without_query(url)} cannot be fetched: {attempts} attempts in {now - failing_since:.0f} s, "
                        f"the last: {error}; see that the server answers, or raise data.fetch_patience_seconds = "
                        f"{patience:g}"
                    ) from error
                if attempts == 1:
                    _log.warning("%s: %s; trying again for up to %.0f s", without_query(url), error, left)
                delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (attempts - 1))
                time.sleep(min(delay * jitter.uniform(0.5, 1), left))

    def _trim(self, newest: Path) -> None:
        """Remove the least recently used shards beyond `data.cache_gib`, and what dead downloads have left."""
        now, found = time.time(), sorted(self._cached())
        total = sum(one.size for one in found)
        for used, size, path in found:
            if path.suffix == PARTIAL:
                remove = now - used > _ABANDONED
            else:
                remove = self._limit < total and path != newest
                if remove and now - used < _SOON and not self._has_warned:
                    self._has_warned = True
                    _log.warning(
                        "data.cache_gib = %g is too small: %s was removed %.0f s after its last use, and shards will "
                        "be downloaded again and again",
                        self._data.cache_gib, path, now - used,
                    )  # fmt: skip
            if remove:
                path.unlink(missing_ok=True)
                total -= size

    def _cached(self) -> Iterator[_Cached]:
        for path in self._cache.glob(_CACHED):
            with suppress(FileNotFoundError):
                status = path.stat()
                yield _Cached(status.st_mtime, status.st_size, path)


def _use(path: Path, size: int) -> bool:
    """Whether the shard is there, whole; its modification time becomes now, by which the least recently used is found.

    The content was checked before the file got its name.
    """
    try:
        os.utime(path)
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


@contextmanager
def _turn(lock: Path) -> Iterator[float | None]:
    """Hold a lock, which the kernel takes back from a process that dies; gives since when it was waited for, if it was.

    A process that holds it without a sign of life, such as one that is stopped, is not waited for: to download a shard
    twice does no harm.
    """
    with lock.open("ab") as file:
        waiting_since = None
        sign, seen = os.fstat(file.fileno()).st_mtime_ns, time.monotonic()
        while not _try_lock(file):
            waiting_since = seen if waiting_since is None else waiting_since
            time.sleep(_POLL)
            last_sign = os.fstat(file.fileno()).st_mtime_ns
            if last_sign != sign:
                sign, seen = last_sign, time.monotonic()
            elif time.monotonic() - seen > _LIFELESS:
                break
        try:
            yield waiting_since
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a forked process may have a copy of the file


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
