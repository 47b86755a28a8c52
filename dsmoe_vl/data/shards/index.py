"""Shards: WebDataset tars, their manifest `index.json`, and samples read by position.

Nothing is ever unpickled: of a sample, only KEY.txt, KEY.json and one picture or video are looked at.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Sample
from dsmoe_vl.data.shards.download import is_remote
from dsmoe_vl.data.shards.remote import RemoteShards
from dsmoe_vl.data.shards.tar import ShardScan, read_files, scan_shard
from dsmoe_vl.errors import DataError, FetchError

INDEX_NAME = "index.json"
SCHEMA_VERSION = 1

_MEDIA_EXTENSIONS = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS
_TEXT_EXTENSIONS = ("txt", "json")
_REINDEX_HINT = f"write the shards again, or delete {INDEX_NAME} to have the tars scanned"
_REWRITE_HINT = "write the shards again"  # a remote folder cannot do without its manifest
_DEFAULTS = DataConfig()
_TURNS = 10  # times that a shard may be removed from the cache before it is read


@dataclass(frozen=True)
class Shard:
    """One row of the manifest; `sha256` is "" where the shard was found without one."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one folder, in the order that sample numbers refer to.

    `remote` is where they come from, None for a local folder; `folder` is then the part of the cache that holds them.
    """

    folder: Path
    split: str
    shards: tuple[Shard, ...]
    remote: RemoteShards | None = field(default=None, compare=False)

    @classmethod
    def load(cls, folder: str | Path, data: DataConfig = _DEFAULTS) -> ShardIndex:
        """Read `folder`/index.json, or scan the tars of a local folder that has none.

        `folder` is what a source's path may be: a local folder, a URL or a command. `data` has the cache and the
        patience for remote ones; their shards are not looked at before they are read.

        Raises DataError where there is nothing to read, the manifest is malformed, or a shard is not the file that
        the manifest describes; FetchError where a server keeps failing; ConfigError for a command that `data` does
        not allow.
        """
        if is_remote(str(folder)):
            index = _read_remote_manifest(str(folder), data)
        elif not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder of shards; check the source's path")
        else:
            manifest = Path(folder) / INDEX_NAME
            index = _read_manifest(manifest) if manifest.is_file() else _scan_folder(Path(folder))
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


def read_sample(
    index: ShardIndex, shard: int, sample: int, source: str = "", epoch: int = 0, media: bool = True
) -> Sample:
    """Read one sample, whole; with `media` False, as if it had no picture or video. A remote shard is fetched first.

    Raises DataError where its shard is damaged there or cannot be had, or its text or JSON is malformed; FetchError
    where a server keeps failing.
    """
    row = index.shards[shard]
    if index.remote is None:
        return _read_local(index.folder / row.name, row, sample, source, epoch, media, _REINDEX_HINT)
    for _ in range(_TURNS):
        path = index.remote.fetch(row.name, row.bytes, row.sha256)
        try:
            return _read_local(path, row, sample, source, epoch, media, _REWRITE_HINT)
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # else another process has just made room
                raise
    raise FetchError(
        f"{path} was removed {_TURNS} times before it could be read: the cache is too small for the shards that are "
        "read at once; raise data.cache_gib"
    )


def _read_local(path: Path, row: Shard, sample: int, source: str, epoch: int, media: bool, hint: str) -> Sample:
    scan = _cached_scan(path)
    if scan.samples != row.samples and not scan.damage:
        raise DataError(
            f"shard does not match its manifest: {path} holds {scan.samples} samples, "
            f"{INDEX_NAME} says {row.samples}; {hint}"
        )
    if sample >= scan.samples:
        raise DataError(f"damaged shard: {path}: {scan.damage}; samples from number {scan.samples} on are lost")
    start, end = scan.bounds[sample : sample + 2].tolist()
    key, files = read_files(path, start, end, _TEXT_EXTENSIONS + (_MEDIA_EXTENSIONS if media else ()))
    try:
        text = files.get("txt", b"").decode("utf-8")
        meta: Any = json.loads(files["json"]) if "json" in files else {}
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are the former
        raise DataError(f"malformed text or JSON: {path}: {key}: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"malformed text or JSON: {path}: {key}.json is not an object")
    media_type = next((extension for extension in files if extension in _MEDIA_EXTENSIONS), "")
    return Sample(key, source, epoch, files.get(media_type), media_type, text, meta)


def iterate_samples(
    folder: str | Path,
    source: str = "",
    media: bool = True,
    data: DataConfig = _DEFAULTS,
    first: int = 0,
    step: int = 1,
) -> Iterator[Sample]:
    """Every sample of a folder, in the order of its shards; `media` as in `read_sample`, the rest as in `load`.

    With `first` and `step` only the samples number first, first + step, ... are read, counted from 0.

    Raises DataError at the first damaged sample, so that a caller never mistakes a part for the whole, and the errors
    of `ShardIndex.load`.
    """
    index = ShardIndex.load(folder, data)
    places = ((number, sample) for number, shard in enumerate(index.shards) for sample in range(shard.samples))
    for number, sample in islice(places, first, None, step):
        yield read_sample(index, number, sample, source, media=media)


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
    split, shards = _parse_manifest(manifest.read_bytes(), str(manifest), _REINDEX_HINT)
    for shard in shards:
        path = manifest.parent / shard.name
        if not path.is_file():
            raise DataError(f"{path}: named in {INDEX_NAME} but not there; copy it again or {_REINDEX_HINT}")
        if path.stat().st_size != shard.bytes:
            raise DataError(
                f"{path} has changed since the manifest: {path.stat().st_size} bytes, {INDEX_NAME} says "
                f"{shard.bytes}; copy it again or {_REINDEX_HINT}"
            )
    return ShardIndex(manifest.parent, split, shards)


def _read_remote_manifest(url: str, data: DataConfig) -> ShardIndex:
    remote = RemoteShards(url, data)
    split, shards = _parse_manifest(remote.read(INDEX_NAME), f"{INDEX_NAME} of {remote.name}", _REWRITE_HINT)
    for shard in shards:
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise DataError(
                f"{INDEX_NAME} of {remote.name} has no sha256 of {shard.name}, without which it is not fetched; "
                f"{_REWRITE_HINT}"
            )
    return ShardIndex(remote.folder, split, shards, remote)


def _parse_manifest(content: bytes, place: str, hint: str) -> tuple[str, tuple[Shard, ...]]:
    """The split and the shards that a manifest names, none of which lies in another folder."""
    try:
        manifest = json.loads(content)
        version = manifest["schema_version"]
        if version != SCHEMA_VERSION:
            raise DataError(f"{place}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}")
        shards = tuple(
            Shard(str(row["name"]), int(row["samples"]), int(row["bytes"]), str(row["sha256"]))
            for row in manifest["shards"]
        )
        split = str(manifest["split"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{place} is malformed ({error!r}); {hint}") from error
    for shard in shards:
        if Path(shard.name).name != shard.name or shard.samples < 0:
            raise DataError(f"{place}: not a shard: {shard.name!r}, {shard.samples} samples; {hint}")
    return split, shards
