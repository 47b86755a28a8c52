"""Writing shards: plain WebDataset tars with a manifest, and the list of records that did not make it into them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from webdataset.writer import TarWriter

from dsmoe_vl.data.shards import INDEX_NAME, SCHEMA_VERSION
from dsmoe_vl.errors import DataError

KEY_LENGTH = 80  # characters; a tar member's name holds 100 with its extension


def sample_key(identifier: str) -> str:
    """A tar key made from any identifier: letters, digits, `_` and `-`, at most KEY_LENGTH characters.

    A WebDataset key ends at the first dot and a slash is a folder, so neither may stay. An identifier that had to be
    changed ends in eight hex digits of its hash, so that `a/b` and `a.b` remain two keys.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", identifier)[:KEY_LENGTH]
    if key == identifier and key:
        return key
    return f"{key[: KEY_LENGTH - 9]}-{hashlib.sha256(_utf8(identifier)).hexdigest()[:8]}"


class ShardWriter:
    """Writes `{split}-00000.tar`, `{split}-00001.tar`, ... and `index.json` into the folder `output`.

    Same samples, same bytes. Shards have the suffix `.partial` until `close()` publishes them all, so that a folder
    with an `index.json` is always complete; leaving the `with` block by an exception publishes nothing.

    Args:
        output: folder; created. One that holds shards already is refused with a DataError.
        samples_per_shard, bytes_per_shard: a shard ends when it has reached either (bytes of media and text).
    """

    def __init__(
        self, output: Path, split: str, samples_per_shard: int = 1000, bytes_per_shard: int = 256 * 2**20
    ) -> None:
        if samples_per_shard < 1 or bytes_per_shard < 1:
            raise DataError(
                f"a shard of {samples_per_shard} samples and {bytes_per_shard} bytes: both must be positive"
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
            raise DataError(f"split {split!r} names the shard files: use letters, digits, '_' and '-'")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {output}: {error.strerror}") from error
        if (output / INDEX_NAME).exists() or any(output.glob("*.tar")):
            raise DataError(f"{output} already holds shards: give an empty folder, or delete it first")
        for leftover in output.glob("*.tar.partial"):  # of a run that was interrupted
            leftover.unlink()
        self.output = output
        self.split = split
        self.samples_per_shard = samples_per_shard
        self.bytes_per_shard = bytes_per_shard
        self.samples = 0
        self._keys: set[str] = set()
        self._shards: list[dict[str, Any]] = []
        self._tar: TarWriter | None = None
        self._tar_samples = 0
        self._tar_bytes = 0

    def write(self, key: str, media: bytes | None, media_type: str, text: str, meta: dict[str, Any]) -> None:
        """Append one sample: KEY.`media_type`, KEY.txt, and KEY.json with `meta` and what the writer knows itself.

        Args:
            key: made safe by `sample_key`. A key that was written before is refused with a DataError.
            media: encoded bytes, stored as they are; None for a text-only sample.
            media_type: extension without a dot ("jpg", "mp4"); ignored without media.
            text: the first caption.
            meta: JSON values; those that are None are left out.
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
        sample["json"] = _utf8(json.dumps(known, ensure_ascii=False, sort_keys=True, separators=(",", ":")))

        if self._tar is None:
            self._tar = TarWriter(str(self._partial(len(self._shards))), mtime=0, encoder=False)
        self._tar_bytes += self._tar.write(sample)
        self._tar_samples += 1
        self._keys.add(safe_key)
        self.samples += 1
        if self._tar_samples >= self.samples_per_shard or self._tar_bytes >= self.bytes_per_shard:
            self._finish_shard()

    def close(self) -> None:
        """Give the shards their names and write `index.json`, last."""
        self._finish_shard()
        for number, shard in enumerate(self._shards):
            os.replace(self._partial(number), self.output / shard["name"])
        index = {"schema_version": SCHEMA_VERSION, "split": self.split, "shards": self._shards}
        temporary = self.output / f"{INDEX_NAME}.partial"
        temporary.write_text(json.dumps(index, indent=2) + "\n")
        os.replace(temporary, self.output / INDEX_NAME)

    def discard(self) -> None:
        """Remove what was written."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
        for partial in self.output.glob(f"{self.split}-*.tar.partial"):
            partial.unlink()

    def _partial(self, number: int) -> Path:
        return self.output / f"{self.split}-{number:05d}.tar.partial"

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self._partial(len(self._shards))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append(
            {
                "name": path.name.removesuffix(".partial"),
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


class Rejects:
    """Records that were skipped: counted by reason and listed in `output`/rejected.jsonl, a line each, as they come."""

    def __init__(self, output: Path, max_rejected: float) -> None:
        """`max_rejected`: the fraction of all records, in [0, 1], above which `check` raises."""
        if not 0.0 <= max_rejected <= 1.0:
            raise DataError(f"--max-rejected {max_rejected}: a fraction between 0 and 1")
        self.path = output / "rejected.jsonl"
        self.max_rejected = max_rejected
        self.reasons: Counter[str] = Counter()
        self.path.unlink(missing_ok=True)

    def add(self, identifier: str, reason: str, detail: str = "") -> None:
        """Note one skipped record; `reason` is a class of problems, `detail` this one's."""
        self.reasons[reason] += 1
        with self.path.open("ab") as file:
            line = json.dumps({"id": identifier, "reason": reason, "detail": detail}, ensure_ascii=False)
            file.write(_utf8(line) + b"\n")

    def summary(self) -> str:
        """`12 missing file, 3 empty caption`, most frequent first; "none" without any."""
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common()) or "none"

    def check(self, written: int) -> None:
        """Raise a DataError if too many records were rejected, or if none of them was `written`."""
        rejected = self.reasons.total()
        if written == 0:
            raise DataError(f"no record could be used ({rejected} rejected: {self.summary()}){self._where()}")
        fraction = rejected / (rejected + written)
        if fraction > self.max_rejected:
            raise DataError(
                f"{rejected} of {rejected + written} records were rejected ({self.summary()}): {fraction:.1%} is more "
                f"than --max-rejected {self.max_rejected:g}{self._where()}"
            )

    def _where(self) -> str:
        return f"; they are listed in {self.path}" if self.reasons else ""


def _utf8(text: str) -> bytes:
    """`text` encoded; the lone surrogates that JSON files of scraped text contain become question marks."""
    return text.encode("utf-8", "replace")
