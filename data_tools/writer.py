"""Writing shards: plain WebDataset tars with a manifest."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dsmoe_vl.data.shards.index import INDEX_NAME, SCHEMA_VERSION
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import PARTIAL, publish, write_atomically, writing

if TYPE_CHECKING:
    from webdataset import TarWriter

KEY_LENGTH = 80  # characters; the name of a tar member has up to 100, with the extension


def sample_key(identifier: str) -> str:
    """A tar key for any identifier: letters, digits, `_` and `-`, at most KEY_LENGTH characters.

    A WebDataset key ends at the first dot, and a slash makes a folder. A changed identifier gets eight hex digits of
    its hash as a suffix, so that `a/b` and `a.b` have different keys.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", identifier)[:KEY_LENGTH]
    if key == identifier and key:
        return key
    return f"{key[: KEY_LENGTH - 9]}-{hashlib.sha256(_utf8(identifier)).hexdigest()[:8]}"


class ShardWriter:
    """Writes `{split}-00000.tar`, `{split}-00001.tar`, ... and `index.json` into the folder `output`.

    The same samples give the same bytes. Shards have the suffix `.partial` until `close()` publishes them, so a folder
    with an `index.json` is complete. An exception in the `with` block removes them.

    Args:
        output: folder; created. Raises DataError if it has shards.
        samples_per_shard, bytes_per_shard: a shard ends when it reaches one of these (bytes of media and text).
    """

    def __init__(
        self, output: Path, split: str, samples_per_shard: int = 1000, bytes_per_shard: int = 256 * 2**20
    ) -> None:
        if samples_per_shard < 1 or bytes_per_shard < 1:
            raise DataError(
                f"a shard of {samples_per_shard} samples and {bytes_per_shard} bytes: both must be positive"
            )
        check_split(split)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {output}: {error.strerror}") from error
        if (output / INDEX_NAME).exists() or any(output.glob("*.tar")):
            raise DataError(f"{output} already has shards: give an empty folder, or delete it first")
        for leftover in output.glob(f"*.tar{PARTIAL}"):  # of an interrupted run
            leftover.unlink()
        self.output = output
        self.split = split
        self.samples_per_shard = samples_per_shard
        self.bytes_per_shard = bytes_per_shard
        self.samples = 0
        self._keys: set[str] = set()
        self._shards: list[dict[str, Any]] = []
        self._tar: TarWriter | None = None
        self._file: _Hashed
        self._tar_samples = 0
        self._tar_bytes = 0

    def write(
        self,
        key: str,
        media: bytes | None,
        media_type: str,
        text: str,
        meta: dict[str, Any],
        *,
        recording: bytes | None = None,
        recording_type: str = "",
    ) -> dict[str, int]:
        """Append one sample: KEY.`media_type`, KEY.`recording_type`, KEY.txt, and KEY.json with `meta`, schema_version,
        split, sha256 of the media and recording_sha256. Returns the bytes of each file, by extension.

        Args:
            key: changed by `sample_key` if necessary. Raises DataError if it was written before.
            media: encoded bytes, stored unchanged; None for a sample without a picture.
            media_type: extension without a dot ("jpg", "mp4"); ignored without media.
            text: the first caption.
            meta: JSON values; None is left out.
            recording, recording_type: encoded speech and its extension ("flac"), as of the media.
        """
        safe_key = sample_key(key)
        if safe_key in self._keys:
            raise DataError(f"two samples have the key {safe_key!r} (identifier {key!r}): identifiers must be unique")
        known = {name: value for name, value in meta.items() if value is not None}
        known |= {"schema_version": SCHEMA_VERSION, "split": self.split}
        sample: dict[str, Any] = {"__key__": safe_key, "txt": _utf8(text)}
        if media is not None:
            sample[media_type] = media
            known["sha256"] = hashlib.sha256(media).hexdigest()
        if recording is not None:
            sample[recording_type] = recording
            known["recording_sha256"] = hashlib.sha256(recording).hexdigest()
        sample["json"] = _utf8(json.dumps(known, ensure_ascii=False, sort_keys=True, separators=(",", ":")))

        if self._tar is None:
            from webdataset import TarWriter  # imports torch, which takes seconds; --help should not

            self._file = _Hashed(self._partial(len(self._shards)))
            self._tar = TarWriter(self._file, mtime=0, encoder=False)
        self._tar_bytes += self._tar.write(sample)
        self._tar_samples += 1
        self._keys.add(safe_key)
        self.samples += 1
        if self._tar_samples >= self.samples_per_shard or self._tar_bytes >= self.bytes_per_shard:
            self._finish_shard()
        return {name: len(data) for name, data in sample.items() if name != "__key__"}

    def close(self) -> None:
        """Give the shards their final names, then write `index.json`."""
        self._finish_shard()
        for number, shard in enumerate(self._shards):
            publish(self._partial(number), self.output / shard["name"])
        write_index(self.output, self.split, self._shards)

    def discard(self) -> None:
        """Remove the shards that were written."""
        if self._tar is not None:
            with suppress(OSError):  # on a full disk the end of the tar cannot be written either
                self._tar.close()
            with suppress(OSError):
                self._file.close()
            self._tar = None
        for partial in self.output.glob(f"{self.split}-*.tar{PARTIAL}"):
            partial.unlink()

    def _partial(self, number: int) -> Path:
        return self.output / f"{self.split}-{number:05d}.tar{PARTIAL}"

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        digest = self._file.close()
        path = self._partial(len(self._shards))
        self._shards.append(
            {
                "name": path.name.removesuffix(PARTIAL),
                "samples": self._tar_samples,
                "bytes": path.stat().st_size,
                "sha256": digest,
            }
        )
        self._tar, self._tar_samples, self._tar_bytes = None, 0, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def check_split(split: str) -> None:
    """Raise DataError if a split cannot be part of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise DataError(f"split {split!r} names the shard files: use letters, digits, '_' and '-'")


def write_index(folder: Path, split: str, shards: list[dict[str, Any]]) -> None:
    """Write `index.json` atomically. The row of a shard has name, samples, bytes and sha256."""
    index = {"schema_version": SCHEMA_VERSION, "split": split, "shards": shards}
    write_atomically(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


class _Hashed:
    """A file that hashes its content while it is written, so that it need not be read again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        with writing(self._path):
            return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> str:
        """Close the file; returns its sha256 in hexadecimal digits."""
        with writing(self._path):
            self._file.close()
        return self._digest.hexdigest()


def _utf8(text: str) -> bytes:
    """`text` in UTF-8. Lone surrogates, which occur in scraped text, become question marks."""
    return text.encode("utf-8", "replace")
