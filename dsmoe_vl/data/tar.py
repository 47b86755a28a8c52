"""Samples in a tar file: found by its headers, read by their bytes, and never half of one.

A sample is a run of consecutive files whose names agree up to the first dot of the base name: its key. The rest of the
name is a file's extension.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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


def scan_shard(path: Path) -> ShardScan:
    """Find the samples of one tar by reading its headers alone. Raises DataError where it cannot be read."""
    starts: list[int] = []
    last_key, end = "", 0
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for member, member_end in _members(file):
                key, _ = _split_name(member)
                if key not in ("", last_key):
                    starts.append(end)
                    last_key = key
                end = member_end
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
    files: dict[str, bytes] = {}
    position = start
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            for member, position in _members(file):
                name = key, extension = _split_name(member)
                if key and name in names:
                    raise DataError(f"repeated key: {path}: {key}.{extension} occurs twice in a row")
                names.add(name)
                if key and extension in extensions and position <= end:
                    file.seek(member.offset_data)
                    files[extension] = file.read(member.size)
                if position >= end:
                    break
    except OSError as error:
        raise _unreadable(path, error) from error
    keys = {key for key, _ in names} - {""}
    if position != end or end > size or len(keys) != 1:
        raise DataError(f"shard changed while it was read: {path}: bytes {start} to {end} are no longer a sample")
    return keys.pop(), files


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The members of a tar from where `file` stands, each with the offset of what follows its data.

    Ends, as tarfile does, at any block that is no header: whether that is the tar's end is for the caller to see.
    """
    end = file.tell()
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
            for member in tar:
                if member.size < 0 or tar.offset <= end:  # tarfile would go round and round
                    return
                end = tar.offset
                yield member, end
    except OSError:
        raise
    except Exception:  # whatever tarfile throws at malformed bytes
        return


def _damage(file: BinaryIO, end: int, size: int) -> str:
    """Why a tar of `size` bytes is not whole whose last member ends at `end`; "" where the end mark, zeros, follows."""
    if end + tarfile.BLOCKSIZE > size:
        return f"truncated at byte {size}"
    file.seek(end)
    return f"no tar header at byte {end}" if any(file.read(tarfile.RECORDSIZE)) else ""


def _split_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """("dir/key", "ext"); ("", "") for what belongs to no sample, such as folders and hidden files."""
    folder, slash, base = member.name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not (stem and dot and member.isreg()) or member.issparse():
        return "", ""
    return folder + slash + stem, extension.lower()


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"shard cannot be read: {path}: {error.strerror}")
