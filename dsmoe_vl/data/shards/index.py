"""Shards: WebDataset tars, their manifest `index.json`, and samples read by position.

Only KEY.txt, KEY.json, one image or video and one recording of a sample are read; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.budget import check_pixels
from dsmoe_vl.data.sample import EXTENSIONS, MEDIA_EXTENSIONS, SPEECH_EXTENSIONS, TEXT_EXTENSIONS, Sample
from dsmoe_vl.data.shards.download import is_remote
from dsmoe_vl.data.shards.habits import NAME_RULE, habit_of, tars_missing
from dsmoe_vl.data.shards.remote import RemoteShards
from dsmoe_vl.data.shards.tar import SampleFiles, ShardScan, read_files, scan_shard
from dsmoe_vl.data.source_map import mapped
from dsmoe_vl.errors import DataError, FetchError
from dsmoe_vl.files import require_regular

INDEX_NAME = "index.json"
SCHEMA_VERSION = 1

_REINDEX_HINT = f"write the shards again, or delete {INDEX_NAME} to have the tars scanned"
_REWRITE_HINT = "write the shards again"  # remote shards need a manifest
_DEFAULTS = DataConfig()
_NO_SOURCE = SourceConfig()
_ATTEMPTS = 10  # to read a remote shard before another process removes it from the cache


@dataclass(frozen=True)
class Shard:
    """A row of the manifest. A shard that was found without a manifest has no `sha256`, but a hash of its `texts`."""

    name: str
    samples: int
    bytes: int
    sha256: str
    texts: str = ""  # `ShardScan.texts`


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one folder, in the order of sample numbers.

    For remote shards, `remote` downloads them and `folder` is their folder in the cache. `data`: the limits of samples.
    """

    folder: Path
    split: str
    shards: tuple[Shard, ...]
    remote: RemoteShards | None = field(default=None, compare=False)
    data: DataConfig = field(default=_DEFAULTS, compare=False)

    @classmethod
    def load(cls, folder: str | Path, data: DataConfig = _DEFAULTS) -> ShardIndex:
        """Read `folder`/index.json; in a local folder without it, scan the tars.

        `folder`: the path of a source: a local folder, a URL or a command. `data`: the limits of samples, and the
        settings for remote shards, which are not checked before they are read.

        Raises DataError if there are no samples, the manifest is malformed, or a local shard differs from it;
        FetchError if a server keeps failing; ConfigError for a command that `data` does not allow.
        """
        if is_remote(str(folder)):
            index = _read_remote_manifest(str(folder), data)
        else:
            manifest = _existing(folder) / INDEX_NAME
            index = _read_manifest(manifest) if manifest.is_file() else _scan_folder(Path(folder))
        if index.samples == 0:
            raise DataError(f"{folder}: no samples in its shards")
        return replace(index, data=data)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def places(self) -> Iterator[tuple[int, int]]:
        """The number of its shard, and its number there, of every sample."""
        return ((shard, sample) for shard, row in enumerate(self.shards) for sample in range(row.samples))

    @property
    def fingerprint(self) -> str:
        """Short hash of names, sample counts and sizes: indexes with the same samples have the same one."""
        rows = [(shard.name, shard.samples, shard.bytes) for shard in self.shards]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    @property
    def contents(self) -> str:
        """What is in the shards, beyond the `fingerprint`: "sha256 HASH" by their manifest, "texts HASH" without one,
        "" if it is not known. A copy has the same; two kinds cannot be compared."""
        for kind in ("sha256", "texts"):
            hashes = [getattr(shard, kind) for shard in self.shards]
            if all(hashes):
                return f"{kind} {hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]}"
        return ""


def manifest_sha256(folder: str | Path, data: DataConfig = _DEFAULTS) -> str:
    """Hex SHA-256 of the rows of a source's manifest, whatever its form; in a local folder without one, of the tars'
    names and sizes. Does not look at the shards that a manifest names.

    `folder`, `data` and errors as in `ShardIndex.load`.
    """
    if is_remote(str(folder)):
        shards = _read_remote_manifest(str(folder), data).shards
    elif (manifest := _existing(folder) / INDEX_NAME).is_file():
        _, shards = _parse_manifest(require_regular(manifest).read_bytes(), str(manifest), _REINDEX_HINT)
    else:
        tars = sorted(Path(folder).glob("*.tar"))
        shards = tuple(Shard(tar.name, 0, tar.stat().st_size, "") for tar in tars)
    return hashlib.sha256(json.dumps([astuple(shard) for shard in shards]).encode()).hexdigest()


class TarSample(NamedTuple):
    """The files of a sample, the local tar that they are in, and whether its key occurs elsewhere there too."""

    files: SampleFiles
    path: Path
    is_scattered: bool


def read_sample(
    index: ShardIndex, shard: int, sample: int, source: SourceConfig = _NO_SOURCE, epoch: int = 0, media: bool = True
) -> Sample:
    """Read one sample of `source`; with `media` False, without its image, video and recording. A remote shard is
    downloaded first.

    Raises DataError if the shard is damaged at the sample or does not exist, the text or JSON is malformed, or the
    sample is above a limit of `index.data`; FetchError if a server keeps failing.
    """
    read = _read(index, shard, sample, source, EXTENSIONS if media else TEXT_EXTENSIONS)
    return parsed(read, source, epoch, index.data)


def read_all_files(index: ShardIndex, shard: int, sample: int, source: SourceConfig = _NO_SOURCE) -> dict[str, Any]:
    """All files of one sample, as WebDataset has them: bytes by extension, `__key__`, and the tar as `__url__`.

    Raises DataError and FetchError as `read_sample` does, but parses nothing.
    """
    read = _read(index, shard, sample, source, None)
    return {"__key__": read.files.key, "__url__": str(read.path), **read.files.files}


def _read(
    index: ShardIndex, shard: int, sample: int, source: SourceConfig, extensions: Collection[str] | None
) -> TarSample:
    row = index.shards[shard]
    if index.remote is None:
        return _read_local(index.folder / row.name, row, sample, source, extensions, index.data, _REINDEX_HINT)
    for _ in range(_ATTEMPTS):
        path = index.remote.fetch(row.name, row.bytes, row.sha256)
        try:
            return _read_local(path, row, sample, source, extensions, index.data, _REWRITE_HINT)
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # else another process has removed it, to make room
                raise
    raise FetchError(
        f"{path} was removed {_ATTEMPTS} times before it could be read: the cache is too small for the shards that are "
        "read at once; raise data.cache_gib"
    )


def _read_local(
    path: Path, row: Shard, sample: int, source: SourceConfig, extensions: Collection[str] | None, data: DataConfig,
    hint: str,
) -> TarSample:  # fmt: skip
    scan = _cached_scan(path, bool(row.texts))
    if scan.samples != row.samples and not scan.damage:
        raise DataError(
            f"shard does not match its manifest: {path} has {scan.samples} samples, "
            f"{INDEX_NAME} says {row.samples}; {hint}"
        )
    if sample >= scan.samples:
        raise DataError(f"damaged shard: {path}: {scan.damage}; samples from number {scan.samples} on are lost")
    start, end = scan.bounds[sample : sample + 2].tolist()
    if not source.map:
        files = read_files(path, start, end, extensions, data)
    else:  # which may look at any file
        files = mapped(source.map, path, read_files(path, start, end, None, data))
    return TarSample(files, path, files.key in scan.scattered)


def parsed(read: TarSample, source: SourceConfig = _NO_SOURCE, epoch: int = 0, data: DataConfig = _DEFAULTS) -> Sample:
    """The sample that files in a tar make. Raises DataError if its text or JSON is malformed, or its picture is above a
    limit of `data`."""
    (key, files, names), path, is_scattered = read
    try:
        text = files.get("txt", b"").decode("utf-8-sig")
        meta: Any = json.loads(files["json"]) if "json" in files else {}
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"malformed text or JSON: {path}: {key}: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"malformed text or JSON: {path}: {key}.json is not an object")
    media_type = next((extension for extension in files if extension in MEDIA_EXTENSIONS), "")
    if media_type:
        check_pixels(f"{key}.{media_type}", files[media_type], data)
    spoken = next((extension for extension in files if extension in SPEECH_EXTENSIONS), "")
    habit = habit_of(key, names, is_scattered)
    return Sample(
        key, source, epoch, files.get(media_type), media_type, text, meta, names, habit, files.get(spoken), spoken
    )


Failed = Callable[[str, int, DataError], None]  # of a sample: the name of its shard, its number there, the reason


def _end(shard: str, sample: int, error: DataError) -> None:
    raise error


def iterate_samples(
    source: SourceConfig, media: bool = True, data: DataConfig = _DEFAULTS, failed: Failed = _end
) -> Iterator[Sample]:
    """The samples of a source in the order of its shards.

    `media` as in `read_sample`, `data` as in `ShardIndex.load`. `failed` is called for a sample that cannot be read,
    which is left out; without it, the first of them raises DataError. Raises the errors of `ShardIndex.load` too.
    """
    index = ShardIndex.load(source.path, data)
    for shard, number in index.places():
        try:
            sample = read_sample(index, shard, number, source, media=media)
        except DataError as error:
            failed(index.shards[shard].name, number, error)
        else:
            yield sample


def _existing(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder of shards; check the source's path")
    return Path(folder)


@lru_cache(maxsize=1024)
def _cached_scan(path: Path, texts: bool) -> ShardScan:
    return scan_shard(path, texts)


def _scan_folder(folder: Path) -> ShardIndex:
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{tars_missing(folder)}; shards are made with `python -m data_tools.convert`")
    shards = []
    ignored = ""
    for tar in tars:
        scan = _cached_scan(tar, True)
        # The damaged part counts as one sample, which is reported as bad once per epoch.
        shards.append(Shard(tar.name, scan.samples + bool(scan.damage), tar.stat().st_size, "", scan.texts))
        ignored = ignored or scan.ignored
    if ignored and not any(shard.samples for shard in shards):
        raise DataError(f"{folder}: no samples in its shards: {ignored} belongs to none; {NAME_RULE}")
    return ShardIndex(folder, "", tuple(shards))


def _read_manifest(manifest: Path) -> ShardIndex:
    split, shards = _parse_manifest(require_regular(manifest).read_bytes(), str(manifest), _REINDEX_HINT)
    for shard in shards:
        path = manifest.parent / shard.name
        if not path.is_file():
            raise DataError(f"{path}: named in {INDEX_NAME} but missing; copy it again or {_REINDEX_HINT}")
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
                f"{INDEX_NAME} of {remote.name} has no sha256 of {shard.name}, which remote shards need; "
                f"{_REWRITE_HINT}"
            )
    return ShardIndex(remote.folder, split, shards, remote)


def _parse_manifest(content: bytes, place: str, hint: str) -> tuple[str, tuple[Shard, ...]]:
    """The split and the shards of a manifest. Raises DataError for a shard in another folder."""
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
