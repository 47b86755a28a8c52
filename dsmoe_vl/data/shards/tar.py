"""Samples in a tar file: found by its headers, read by their bytes, and never half of one.

A sample is a run of consecutive files whose names agree up to the first dot of the base name: its key. The rest of the
name is a file's extension.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dsmoe_vl.errors import DataError


@dataclass(frozen=True)
class ShardScan:
    """Sample i of a tar is the bytes [bounds[i], bounds[i + 1]); bounds int64 [samples + 1].

    `damage` says what ended the scan early, "" for a whole tar. The sample that the damage cuts is not among them.
    """

    bounds: np.ndarray
    damage: str

    @property
    def samples(self) -> int:
        return len(self.bounds) - 1


class _Member(NamedTuple):
    """A file in a tar, or something else that a header describes; offsets in bytes."""

    name: str
    is_file: bool
    start: int  # of its data
    size: int
    end: int  # of its data and their padding


def scan_shard(path: Path) -> ShardScan:
    """Find the samples of one tar by reading its headers alone. Raises DataError where it cannot be read."""
    starts: list[int] = []
    links: dict[str, int] = {}  # where the first one of a key lies: it may be the first member of the next sample
    last_key, end = "", 0
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for member in _members(file, 0):
                key = _split_name(member.name)[0]
                if not member.is_file:
                    links.setdefault(key, end)
                elif key not in ("", last_key):
                    starts.append(links.get(key, end))
                    last_key = key
                    links.clear()
                end = member.end
                if end > size:
                    break
            damage = _damage(file, end, size)
    except OSError as error:
        raise _unreadable(path, error) from error
    # Files of the last sample may lie beyond the damage, so what was seen of it may be a half.
    bounds = starts if damage else [*starts, end]
    return ShardScan(np.asarray(bounds or [0], dtype=np.int64), damage)


def read_files(path: Path, start: int, end: int, extensions: Collection[str]) -> tuple[str, dict[str, bytes]]:
    """The key of the sample in the bytes [start, end) of a tar, and by extension those of its files that are asked for.

    Raises DataError where the file cannot be read, has changed since it was scanned, or two names there are equal.
    """
    names: set[tuple[str, str]] = set()
    others: set[str] = set()  # keys of members that are no files
    files: dict[str, bytes] = {}
    position = start
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for member in _members(file, start):
                position = member.end
                name = key, extension = _split_name(member.name)
                if not member.is_file:
                    others.add(key)
                elif key:
                    if name in names:
                        raise DataError(f"repeated key: {path}: {key}.{extension} occurs twice in a row")
                    names.add(name)
                    if extension in extensions and position <= end:
                        file.seek(member.start)
                        files[extension] = file.read(member.size)  # one system call ends after 2 GiB
                if position >= end:
                    break
    except OSError as error:
        raise _unreadable(path, error) from error
    keys = {key for key, _ in names}
    if position != end or end > size or len(keys) != 1:
        raise DataError(f"shard changed while it was read: {path}: bytes {start} to {end} are no longer a sample")
    if keys <= others:
        raise DataError(f"file missing: {path}: {keys.pop()} has a link or a sparse file, which are not read")
    return keys.pop(), files


def _members(file: BinaryIO, position: int) -> Iterator[_Member]:
    """The members of a tar from the header at `position` on.

    Ends, as tarfile does, at any block that is no header: whether that is the tar's end is for the caller to see. Plain
    headers, which is nearly all of them, are read here in a third of tarfile's time; from the first other one on
    (long names, sparse files, damage) tarfile reads.
    """
    while member := _plain_member(os.pread(file.fileno(), tarfile.BLOCKSIZE, position), position):
        yield member
        position = member.end
    file.seek(position)
    end = position
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
            for info in tar:
                if info.size < 0 or tar.offset <= end:  # tarfile would go round and round
                    return
                end = tar.offset
                yield _Member(info.name, info.isreg() and not info.issparse(), info.offset_data, info.size, end)
    except OSError:
        raise
    except Exception:  # whatever tarfile throws at malformed bytes
        return


_END_MARK = 2**17  # bytes of zeros at most; two blocks, filled up to a record, which some programs make this large
_PLAIN_NUMBER = re.compile(rb" *([0-7]+)[ \0]*")  # octal


def _plain_member(header: bytes, position: int) -> _Member | None:
    """What a ustar header of an ordinary file with an ordinary name says; None for any other block."""
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


def _damage(file: BinaryIO, end: int, size: int) -> str:
    """Why a tar of `size` bytes is not whole whose last member ends at `end`; "" where the end mark, zeros, follows."""
    if end + tarfile.BLOCKSIZE > size:
        return f"truncated at byte {size}"
    file.seek(end)
    if any(file.read(_END_MARK)):
        return f"no tar header at byte {end}"
    # A copy that was interrupted may have its full size already, and zeros for the rest.
    return f"zeros from byte {end} to {size}" if size - end > _END_MARK else ""


def _split_name(name: str) -> tuple[str, str]:
    """("dir/key", "ext"); ("", "") for what belongs to no sample, such as folders and hidden files."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not (stem and dot):
        return "", ""
    return folder + slash + stem, extension.lower()


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"shard cannot be read: {path}: {error.strerror}")
