"""Shards: WebDataset tars, their manifest `index.json`, and samples read by position.

A sample is a run of consecutive members whose names agree up to the first dot of the base name. Nothing is ever
unpickled: of a sample, only KEY.txt, KEY.json and one picture or video are looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_vl.data.segment import Sample
from dsmoe_vl.errors import DataError

INDEX_NAME = "index.json"
SCHEMA_VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi")

_BLOCK = 512  # bytes; a tar is a sequence of such blocks
_REGULAR_FILES = (b"0", b"\0", b"7")
_REINDEX_HINT = f"write the shards again, or delete {INDEX_NAME} to have the tars scanned"


@dataclass(frozen=True)
class Shard:
    """One row of the manifest; `sha256` is "" where the shard was found without one."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one folder, in the order that sample numbers refer to."""

    folder: Path
    split: str
    shards: tuple[Shard, ...]

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """Read `folder`/index.json, or scan the tars of a folder that has none.

        Raises DataError where there is nothing to read, the manifest is malformed, or a shard is not the file that
        the manifest describes.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of shards; check the source's path")
        manifest = folder / INDEX_NAME
        index = _read_manifest(manifest) if manifest.is_file() else _scan_folder(folder)
        if index.samples == 0:
            raise DataError(f"{folder}: no samples in its shards")
        return index

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Short hash over names, sample counts and sizes: equal where sample numbers mean the same samples."""
        rows = [(shard.name, shard.samples, shard.bytes) for shard in self.shards]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


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


def scan_shard(path: str | Path) -> ShardScan:
    """Find the samples of one tar by reading its headers alone. Raises DataError where it cannot be opened."""
    starts: list[int] = []
    current_key, end = "", 0
    damage = ""
    try:
        with open(path, "rb", buffering=0) as file:
            descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
            try:
                for member in _members(lambda offset, count: os.pread(descriptor, count, offset), size):
                    if member.key != current_key:
                        starts.append(member.start)
                        current_key = member.key
                    end = member.end
            except _DamagedTarError as error:
                damage = str(error)
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}") from error
    # Members of the last sample may lie beyond the damage, so what was seen of it may be a half.
    bounds = starts if damage else [*starts, end]
    return ShardScan(np.asarray(bounds or [0], dtype=np.int64), damage)


def read_sample(index: ShardIndex, shard: int, sample: int, source: str = "", epoch: int = 0) -> Sample:
    """Read one sample, whole. Raises DataError where its shard is damaged there or its text or JSON is malformed."""
    row = index.shards[shard]
    path = index.folder / row.name
    scan = _cached_scan(path)
    if scan.samples != row.samples and not scan.damage:
        raise DataError(
            f"shard does not match its manifest: {path} holds {scan.samples} samples, "
            f"{INDEX_NAME} says {row.samples}; {_REINDEX_HINT}"
        )
    if sample >= scan.samples:
        raise DataError(f"damaged shard: {path}: {scan.damage}; samples from number {scan.samples} on are lost")
    start, end = int(scan.bounds[sample]), int(scan.bounds[sample + 1])
    try:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), end - start, start)
    except OSError as error:
        raise DataError(f"shard cannot be read: {path}: {error.strerror}") from error
    try:
        members = list(_members(lambda offset, count: data[offset : offset + count], len(data), inside=True))
    except _DamagedTarError as error:
        raise DataError(f"shard changed while it was read: {path}: {error}") from error
    return _to_sample(data, members, path, source, epoch)


def iterate_samples(folder: str | Path, source: str = "") -> Iterator[Sample]:
    """Every sample of a folder, in the order of its shards.

    Raises DataError at the first damaged sample, so that a caller never mistakes a part for the whole.
    """
    index = ShardIndex.load(folder)
    for number, shard in enumerate(index.shards):
        for sample in range(shard.samples):
            yield read_sample(index, number, sample, source)


@dataclass(frozen=True)
class _Member:
    start: int  # of its first header
    end: int  # of its padded data
    key: str
    extension: str
    data: int  # offset of its bytes
    size: int


class _DamagedTarError(Exception):
    pass


def _members(read: Callable[[int, int], bytes], size: int, inside: bool = False) -> Iterator[_Member]:
    """The regular files of a tar of `size` bytes (ustar, GNU and pax headers).

    Raises _DamagedTarError at a header that is none, at data that is cut, and at a missing end mark; `inside` a tar
    there is no end mark to miss.
    """
    offset = start = 0
    long_name, long_size = "", -1
    while not (inside and offset == size):
        header = read(offset, _BLOCK)
        if len(header) < _BLOCK:
            raise _DamagedTarError(f"truncated at byte {size}")
        if header.count(0) == _BLOCK:
            return
        length, kind = _parse_header(header, offset)
        if long_size >= 0 and kind not in b"xgLK":
            length = long_size
        data = offset + _BLOCK
        offset = data + -(-length // _BLOCK) * _BLOCK
        if data + length > size:
            raise _DamagedTarError(f"truncated at byte {size}")
        if kind == b"x":
            fields = _pax_fields(read(data, length), offset)
            long_name = fields.get("path", long_name)
            long_size = int(fields.get("size", long_size))
        elif kind == b"L":
            long_name = _text(read(data, length))
        elif kind not in (b"g", b"K"):
            if kind in _REGULAR_FILES:
                key, extension = _split_name(long_name or _short_name(header))
                if key:
                    yield _Member(start, offset, key, extension, data, length)
            long_name, long_size, start = "", -1, offset


def _parse_header(header: bytes, offset: int) -> tuple[int, bytes]:
    """Data size and type flag, after the checksum is checked."""
    try:
        checksum = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
        if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError("checksum")
        if header[124] & 0x80:  # base 256, for 8 GiB and more
            length = int.from_bytes(header[125:136], "big")
        else:
            length = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        if length < 0:
            raise ValueError("negative size")
    except ValueError as error:
        raise _DamagedTarError(f"no tar header at byte {offset}") from error
    return length, header[156:157]


def _short_name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _pax_fields(records: bytes, offset: int) -> dict[str, str]:
    """The fields of a run of "LENGTH NAME=VALUE\\n" records, LENGTH being the record's own."""
    fields: dict[str, str] = {}
    while records:
        digits, _, rest = records.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        name, equals, value = rest[: length - len(digits) - 1].partition(b"=")
        if not equals or (name == b"size" and not value.strip().isdigit()):
            raise _DamagedTarError(f"malformed pax header before byte {offset}")
        fields[_text(name)] = _text(value[:-1])
        records = records[length:]
    return fields


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _split_name(name: str) -> tuple[str, str]:
    """("dir/key", "ext"); ("", "") for names that belong to no sample, such as hidden files."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def _to_sample(data: bytes, members: list[_Member], path: Path, source: str, epoch: int) -> Sample:
    content: dict[str, bytes] = {}
    for member in members:
        if member.extension in content:
            raise DataError(f"repeated key: {path}: {member.key}.{member.extension} occurs twice in a row")
        content[member.extension] = data[member.data : member.data + member.size]
    key = members[0].key
    media_type = next((name for name in content if name in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS), "")
    try:
        text = content.get("txt", b"").decode("utf-8")
        meta: Any = json.loads(content["json"]) if "json" in content else {}
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both
        raise DataError(f"malformed text or JSON: {path}: {key}: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"malformed text or JSON: {path}: {key}.json is not an object")
    return Sample(key, source, epoch, content.get(media_type), media_type, text, meta)


@lru_cache(maxsize=1024)
def _cached_scan(path: Path) -> ShardScan:
    return scan_shard(path)


def _scan_folder(folder: Path) -> ShardIndex:
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder}: neither {INDEX_NAME} nor *.tar; make shards with `python -m data_tools.convert`")
    shards = []
    for tar in tars:
        scan = _cached_scan(tar)
        # What damage cuts off counts as one sample: it is met once an epoch and reported as a bad one.
        shards.append(Shard(tar.name, scan.samples + bool(scan.damage), tar.stat().st_size, ""))
    return ShardIndex(folder, "", tuple(shards))


def _read_manifest(manifest: Path) -> ShardIndex:
    try:
        content = json.loads(manifest.read_bytes())
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise DataError(f"{manifest}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}")
        shards = tuple(
            Shard(str(row["name"]), int(row["samples"]), int(row["bytes"]), str(row["sha256"]))
            for row in content["shards"]
        )
        split = str(content["split"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{manifest} is malformed ({error!r}); {_REINDEX_HINT}") from error
    for shard in shards:
        path = manifest.parent / shard.name
        if Path(shard.name).name != shard.name or shard.samples < 0:
            raise DataError(f"{manifest}: not a shard: {shard.name!r}, {shard.samples} samples; {_REINDEX_HINT}")
        if not path.is_file():
            raise DataError(f"{path}: named in {INDEX_NAME} but not there; copy it again or {_REINDEX_HINT}")
        if path.stat().st_size != shard.bytes:
            raise DataError(
                f"{path} has changed since the manifest: {path.stat().st_size} bytes, {INDEX_NAME} says "
                f"{shard.bytes}; copy it again or {_REINDEX_HINT}"
            )
    return ShardIndex(manifest.parent, split, shards)
