"""Remote shards: each is downloaded whole, once per host, into a cache that processes and runs share.

    CACHE/FOLDER/SHARD-NAME      FOLDER is a hash of the URL, SHARD of the content: a changed shard is a new file
    CACHE/locks/FOLDER-SHARD     locked by the process that downloads the shard

A missing or wrong shard is a fault of the data: a DataError, and its samples are skipped. A server that keeps failing,
or a cache that cannot be written, is not: skipping would change the order of the data, so a FetchError ends the run.
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
from dsmoe_vl.console import printable
from dsmoe_vl.data.shards.download import PermanentFailure, TransientFailure, download, file_url, without_query
from dsmoe_vl.errors import ConfigError, DataError, FetchError
from dsmoe_vl.files import PARTIAL, replacing

_TIMEOUT = 30.0  # seconds without a byte after which a download fails
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds between attempts, doubling
_POLL = 0.05  # seconds between attempts to get a lock
_LOCK_TIMEOUT = 180.0  # seconds without progress after which the owner of a lock is not waited for
_ABANDONED = 3600.0  # seconds after the last byte when an unfinished download is removed
_SOON = 600.0  # seconds since the last use; removing a shard earlier means that the cache is too small
_HEX = 16  # digits of a hash in a name
# Only files of this form are ever removed.
_CACHED = "[0-9a-f]" * _HEX + "/" + "[0-9a-f]" * _HEX + "-*"

T = TypeVar("T")
_log = logging.getLogger(__name__)


class _Mismatch(TransientFailure):
    """The downloaded file is not the one that the manifest describes."""


class _Cached(NamedTuple):
    used: float  # seconds since 1970
    size: int
    path: Path


class RemoteShards:
    """The shards behind a URL or a command, and their folder in the cache. Can be pickled."""

    def __init__(self, url: str, data: DataConfig) -> None:
        """Does not read anything yet. Raises ConfigError for a command unless `data.allow_pipe` is set."""
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
        self.folder = self._cache / key
        self._limit = data.cache_gib * 2**30 or math.inf  # bytes
        self._timeout = min(_TIMEOUT, data.fetch_patience_seconds)
        self._unavailable: dict[Path, str] = {}  # the reason; these shards are not tried again
        self._not_prefetched: set[Path] = set()  # prefetching failed and is not tried again
        self._has_warned = False

    def read(self, name: str) -> bytes:
        """The present content of a small file, which is not cached.

        Raises DataError if it does not exist, FetchError if the server keeps failing.
        """
        try:
            url = file_url(self._url, name)
            return self._retried(url, lambda: b"".join(download(url, self._timeout)))
        except PermanentFailure as error:
            raise DataError(
                f"{self.name}: {name} cannot be fetched: {error}; check the source's path: a remote "
                f"folder needs {name} beside its shards, as `python -m data_tools.convert` writes it"
            ) from error

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """The cached copy of a shard of `size` bytes, downloaded if absent. Another process may remove it to make room.

        Raises DataError if the shard does not exist or differs from the manifest, FetchError if the server keeps
        failing or the cache cannot be written.
        """
        path = self._cache_path(name, sha256)
        if path in self._unavailable:
            raise DataError(self._unavailable[path])
        try:
            if not _touch(path, size):
                self._download(path, name, size, sha256)
        except PermanentFailure as error:
            self._unavailable[path] = f"shard cannot be fetched: {self.name}: {name}: {error}"
            raise DataError(self._unavailable[path]) from error
        except OSError as error:  # of the cache: those of a download have become failures
            raise FetchError(
                f"data.cache = {self._data.cache}: {path} cannot be written: {error}; make room, lower "
                f"data.cache_gib = {self._data.cache_gib}, or choose another folder"
            ) from error
        return path

    def prefetch(self, name: str, size: int, sha256: str) -> None:
        """As `fetch`, but without errors, and only into free room: shards that are being read must stay cached."""
        path = self._cache_path(name, sha256)
        if path in self._unavailable or path in self._not_prefetched or path.exists():
            return
        try:
            if sum(one.size for one in self._cached()) + size <= self._limit:
                self._download(path, name, size, sha256)
        except (PermanentFailure, FetchError, OSError):
            self._not_prefetched.add(path)

    def _cache_path(self, name: str, sha256: str) -> Path:
        return self.folder / f"{sha256[:_HEX]}-{name}"

    def _download(self, path: Path, name: str, size: int, sha256: str) -> None:
        url = file_url(self._url, name)
        lock = self._cache / "locks" / f"{self.folder.name}-{sha256[:_HEX]}"
        for folder in (path.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(lock) as failing_since:
            if not _touch(path, size):  # another process may have been faster
                self._retried(url, lambda: self._download_once(url, path, lock, size, sha256), failing_since)
                self._trim(path)

    def _download_once(self, url: str, path: Path, lock: Path, size: int, sha256: str) -> None:
        """One attempt. The modification time of `lock` shows its progress to other processes."""
        os.utime(lock)
        received, digest = 0, hashlib.sha256()
        with replacing(path) as partial:
            partial.touch(0o600)  # the folder may be private
            with partial.open("wb") as file, closing(download(url, self._timeout, size)) as source:
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

    def _retried(self, url: str, attempt: Callable[[], T], failing_since: float | None = None) -> T:
        """Call `attempt` until it succeeds. Raises FetchError after failing for `data.fetch_patience_seconds`.

        `failing_since` (monotonic seconds): when another process began to try. Processes that wait for one server
        then give up together, not one after another.
        """
        patience = self._data.fetch_patience_seconds
        jitter = random.Random()  # the global random state belongs to the run
        attempts = mismatches = 0
        while True:
            attempts += 1
            try:
                return attempt()
            except TransientFailure as error:
                if isinstance(error, _Mismatch):  # the first time it may come from a proxy; try once more
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
                    failure = printable(f"{without_query(url)}: {error}")
                    _log.warning("%s; trying again for up to %.0f s", failure, left)
                delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (attempts - 1))
                time.sleep(min(delay * jitter.uniform(0.5, 1), left))

    def _trim(self, newest: Path) -> None:
        """Remove the least recently used shards beyond `data.cache_gib`, and abandoned downloads."""
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


def _touch(path: Path, size: int) -> bool:
    """Whether the shard is cached. Sets its modification time to now, which marks it as used.

    The size is enough: the hash was checked before the file got its name.
    """
    try:
        os.utime(path)
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


@contextmanager
def _locked(lock: Path) -> Iterator[float | None]:
    """Lock a file; yields the monotonic seconds when waiting began, None if there was no wait.

    The kernel releases the lock of a process that dies. A process that is stopped is not waited for: downloading a
    shard twice does no harm.
    """
    with lock.open("ab") as file:
        waiting_since = None
        progress, seen = os.fstat(file.fileno()).st_mtime_ns, time.monotonic()
        while not _try_lock(file):
            waiting_since = seen if waiting_since is None else waiting_since
            time.sleep(_POLL)
            latest = os.fstat(file.fileno()).st_mtime_ns
            if latest != progress:
                progress, seen = latest, time.monotonic()
            elif time.monotonic() - seen > _LOCK_TIMEOUT:
                break
        try:
            yield waiting_since
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough if a forked process has the file open too


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
