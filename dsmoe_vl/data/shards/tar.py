"""Samples of a tar file: found by its headers, read by position, and never incomplete.

A sample is a run of consecutive files with the same key: their name up to the first dot of the base name. The rest of
the name is the extension of a file.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.budget import check_bytes
from dsmoe_vl.data.sample import TEXT_EXTENSIONS, split_name
from dsmoe_vl.data.shards.habits import other_format
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import open_regular

_DEFAULTS = DataConfig()


@dataclass(frozen=True)
class ShardScan:
    """Sample i of a tar is in the bytes [bounds[i], bounds[i + 1]); bounds int64 [samples + 1].

    `damage`: why the scan ended early, "" for an undamaged tar. The damaged sample is not included.
    `scattered`: keys that several samples have. `ignored`: the first file that belongs to no sample, "" if none.
    `texts`: hex SHA-256 of the names and sizes of all files and of the contents of KEY.txt and KEY.json; "" if it was
    not asked for. A copy has the same, whatever its times are.
    """

    bounds: np.ndarray
    damage: str
    scattered: frozenset[str] = frozenset()
    ignored: str = ""
    texts: str = ""

    @property
    def samples(self) -> int:
        return len(self.bounds) - 1


class _Member(NamedTuple):
    """A member of a tar: a file, folder, link, ... Offsets in bytes."""

    name: str
    is_file: bool
    start: int  # of its data
    size: int
    end: int  # of its data and padding


def scan_shard(path: Path, texts: bool = False) -> ShardScan:
    """Find the samples of a tar by its headers; `texts`: hash their texts. Raises DataError if it cannot be read."""
    digest = hashlib.sha256()
    starts: list[int] = []
    links: dict[str, int] = {}  # by key, the place of the first link: it may begin the next sample
    keys: set[str] = set()
    scattered: set[str] = set()
    last_key, end, ignored = "", 0, ""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            for member in _members(file, _Window(file), 0):
                key, extension = split_name(member.name)
                if texts:  # which stand right behind their headers
                    digest.update(f"{member.name}\0{member.size}\0".encode("utf-8", "surrogatepass"))
                    if extension in TEXT_EXTENSIONS:
                        digest.update(os.pread(file.fileno(), min(member.size, _LONGEST_TEXT), member.start))
                if not member.is_file:
                    links.setdefault(key, end)
                elif not key:
                    ignored = ignored or member.name
                elif key != last_key:
                    (scattered if key in keys else keys).add(key)
                    starts.append(links.get(key, end))
                    last_key = key
                    links.clear()
                end = member.end
                if end > size:
                    break
            damage = _damage(file, end, size)
    except OSError as error:
        raise _unreadable(path, error) from error
    # The last sample may have files beyond the damage, so it may be incomplete.
    bounds = starts if damage else [*starts, end]
    found = np.asarray(bounds or [0], dtype=np.int64)
    return ShardScan(found, damage, frozenset(scattered), ignored, digest.hexdigest() if texts else "")


class SampleFiles(NamedTuple):
    """`key` of a sample, its `files` that were asked for, by extension, and the `names` of all its files in the tar."""

    key: str
    files: dict[str, bytes]
    names: tuple[str, ...]


def read_files(
    path: Path, start: int, end: int, extensions: Collection[str] | None, data: DataConfig = _DEFAULTS
) -> SampleFiles:
    """The sample in the bytes [start, end) of a tar, with its files of these `extensions`, or with all.

    Raises DataError if the tar cannot be read, has changed since its scan, has two files of one name there, or has a
    file above a limit of `data`.
    """
    names: dict[tuple[str, str], str] = {}
    others: set[str] = set()  # keys of members that are not files
    files: dict[str, bytes] = {}
    position = start
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            window = _Window(file, start, end)
            for member in _members(file, window, start):
                position = member.end
                name = key, extension = split_name(member.name)
                if not member.is_file:
                    others.add(key)
                elif key:
                    if name in names:
                        raise DataError(f"repeated key: {path}: {key}.{extension} occurs twice in a row")
                    names[name] = member.name
                    if (extensions is None or extension in extensions) and position <= end:
                        check_bytes(member.name, extension, member.size, data)
                        files[extension] = window.read(member.start, member.size)
                if position >= end:
                    break
    except OSError as error:
        raise _unreadable(path, error) from error
    keys = {key for key, _ in names}
    if position != end or end > size or len(keys) != 1:
        raise DataError(f"shard changed while it was read: {path}: bytes {start} to {end} are no longer a sample")
    if keys <= others:
        raise DataError(f"file missing: {path}: {keys.pop()} has a link or a sparse file, which are not read")
    return SampleFiles(keys.pop(), files, tuple(names.values()))


class _Window:
    """Bytes of a file by position. A sample of usual size is read as a whole, because each call of the operating system
    takes as long as parsing a header."""

    def __init__(self, file: FileIO, start: int = 0, end: int = 0) -> None:
        """The bytes [start, end) will be asked for."""
        self._handle, self._start = file.fileno(), start
        length = end - start
        self._bytes = os.pread(self._handle, length, start) if 0 < length <= _WINDOW else b""

    def read(self, position: int, size: int) -> bytes:
        """Fewer than `size` bytes at the end of the file."""
        at = position - self._start
        if at >= 0 and at + size <= len(self._bytes):
            return self._bytes[at : at + size]
        parts = []
        while size and (part := os.pread(self._handle, min(size, _AT_ONCE), position)):
            parts.append(part)
            position, size = position + len(part), size - len(part)
        return b"".join(parts)


def _members(file: FileIO, window: _Window, position: int) -> Iterator[_Member]:
    """The members of a tar from the header at `position` on.

    Ends, as tarfile does, at any block that is not a header; the caller checks whether this is the end of the tar.
    Plain headers, which nearly all are, are read here in a third of tarfile's time. From the first other header on
    (long names, sparse files, damage) tarfile reads.
    """
    while member := _plain_member(window.read(position, tarfile.BLOCKSIZE), position):
        yield member
        position = member.end
    file.seek(position)
    end = position
    headers: Any = _Headers(file)
    try:
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="replace") as tar:
            for info in tar:
                if info.size < 0 or tar.offset <= end:  # tarfile would never end
                    return
                end = tar.offset
                yield _Member(info.name, info.isreg() and not info.issparse(), info.offset_data, info.size, end)
    except OSError:
        raise
    except Exception:  # tarfile raises anything for malformed bytes
        return


class _Headers:
    """A tar for tarfile, which reads only headers and would read one of any size."""

    def __init__(self, file: FileIO) -> None:
        self.tell, self.seek, self._read = file.tell, file.seek, file.read

    def read(self, size: int) -> bytes:
        if size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


_WINDOW = 2**20  # bytes of a sample that is read as a whole
_AT_ONCE = 2**30  # bytes; the operating system reads at most 2 GiB
_LONGEST_TEXT = 2**20  # bytes of a text that count for `ShardScan.texts`
_LONGEST_HEADER = 2**20  # bytes, of long names and extended attributes
_END_MARK = 2**17  # bytes of zeros at most: two blocks, padded to a record, which can be this large
_PLAIN_NUMBER = re.compile(rb" *([0-7]+)[ \0]*")  # octal


def _plain_member(header: bytes, position: int) -> _Member | None:
    """The member that a ustar header describes; None if it is not an ordinary file with a short name."""
    if len(header) < tarfile.BLOCKSIZE or header[156:157] not in b"0" or header[257:262] != b"ustar":
        return None
    size, checksum = _PLAIN_NUMBER.fullmatch(header[124:136]), _PLAIN_NUMBER.fullmatch(header[148:156])
    # The checksum counts its own field as spaces.
    if size is None or checksum is None or int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * 0x20:
        return None
    name = header[:100].partition(b"\0")[0]
    if folder := header[345:500].partition(b"\0")[0]:
        name = folder + b"/" + name
    start, length = position + tarfile.BLOCKSIZE, int(size[1], 8)
    padding = -length % tarfile.BLOCKSIZE
    return _Member(name.decode("utf-8", "replace"), True, start, length, start + length + padding)


def _damage(file: FileIO, end: int, size: int) -> str:
    """The damage of a tar of `size` bytes whose last member ends at `end`; "" if zeros follow, the end mark."""
    file.seek(0)
    if not end and (what := other_format(file.read(tarfile.BLOCKSIZE))):
        return what
    if end + tarfile.BLOCKSIZE > size:
        return f"truncated at byte {size}"
    file.seek(end)
    if any(file.read(_END_MARK)):
        return f"no tar header at byte {end}"
    # An interrupted copy may have its full size, with zeros at the end.
    return f"zeros from byte {end} to {size}" if size - end > _END_MARK else ""


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"shard cannot be read: {path}: {error.strerror}")
