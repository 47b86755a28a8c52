"""A conversion in parts, which any number of processes and hosts can make, and which can be interrupted.

Part n has `samples_per_shard` records, from number n * samples_per_shard on. It becomes a shard folder of its own,
`OUTPUT/.unfinished/part-00000n/`. Its `index.json` is written last; a part without it is made again. The bytes of a
part do not depend on the process that makes it. When all parts are complete, `publish` gives the shards their names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.check import Checked, Reencoding, check
from data_tools.formats import Record
from data_tools.writer import ShardWriter, check_split, sample_key, write_index
from dsmoe_vl.data.shards.index import INDEX_NAME
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import write_atomically, write_json

REJECTED_NAME = "rejected.jsonl"
NOTES_NAME = "notes.jsonl"
_UNFINISHED = ".unfinished"
_REMOVED = ".removed"  # its name while it is removed
_PLAN_NAME = "conversion.json"


@dataclass(frozen=True)
class Settings:
    """The settings that the output depends on, besides the records."""

    source: str  # name of the dataset, written to every KEY.json
    split: str = "train"
    samples_per_shard: int = 1000
    bytes_per_shard: int = 256 * 2**20
    reencoding: Reencoding = field(default_factory=Reencoding)

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.samples_per_shard < 1 or self.bytes_per_shard < 1:
            raise DataError(
                f"a shard of {self.samples_per_shard} samples and {self.bytes_per_shard} bytes: both must be positive"
            )


@dataclass(frozen=True)
class Outcome:
    """The result of a conversion. `reasons`: counts of rejected records; `listing`: the file that lists them. `notes`:
    counts of what was done to samples that were written, and `noted` the file that lists it."""

    written: int
    reasons: Counter[str]
    listing: Path
    notes: Counter[str] = field(default_factory=Counter)
    noted: Path = Path(NOTES_NAME)

    def summary(self) -> str:
        """`12 missing file, 3 empty caption`, most frequent first; "none" without any."""
        return _counts(self.reasons)

    def notes_summary(self) -> str:
        """As `summary`, of the notes."""
        return _counts(self.notes)


class Parts:
    """The parts of one conversion."""

    def __init__(self, output: Path, records: Sequence[Record], settings: Settings) -> None:
        self.output, self.settings = output, settings
        self.records = records
        self.folder = output / _UNFINISHED
        self.count = -(-len(records) // settings.samples_per_shard)
        self._plan_file = self.folder / _PLAN_NAME

    def open(self) -> list[int]:
        """Start the conversion, or continue an interrupted one of the same records.

        Returns the numbers of the parts that are missing. Raises DataError if the folder has shards or another
        conversion, or if two records would have the same key.
        """
        _check_keys(self.records)
        plan = {"records": fingerprint(self.records), **asdict(self.settings)}
        if self._plan_file.exists():
            self._check_same_plan(plan)
        else:
            self._check_no_shards()
            self._start(plan)
        return [number for number in range(self.count) if not (self.path(number) / INDEX_NAME).exists()]

    def of(self, number: int) -> Sequence[Record]:
        """The records of a part."""
        first = number * self.settings.samples_per_shard
        return self.records[first : first + self.settings.samples_per_shard]

    def path(self, number: int) -> Path:
        """The folder of a part."""
        return self.folder / f"part-{number:06d}"

    def publish(self, max_rejected: float) -> Outcome:
        """Give all shards their final names, list what was rejected, write index.json and remove the parts.

        Can be repeated after an interruption. If more than the fraction `max_rejected` of the records was rejected, or
        none could be used, raises DataError and leaves only the list.
        """
        indexes = [_loaded(self.path(number) / INDEX_NAME)["shards"] for number in range(self.count)]
        listing = self.output / REJECTED_NAME
        lists = [(self.path(number) / REJECTED_NAME).read_text(encoding="utf-8") for number in range(self.count)]
        reasons = Counter(json.loads(line)["reason"] for part in lists for line in part.splitlines())
        noted = self.output / NOTES_NAME
        notes = [(self.path(number) / NOTES_NAME).read_text(encoding="utf-8") for number in range(self.count)]
        note_counts = Counter(json.loads(line)["note"] for part in notes for line in part.splitlines())
        written = sum(shard["samples"] for index in indexes for shard in index)
        outcome = Outcome(written, reasons, listing, note_counts, noted)
        if reasons:
            write_atomically(listing, "".join(lists))
        if note_counts:
            write_atomically(noted, "".join(notes))
        try:
            _check_budget(outcome, max_rejected)
        except DataError:
            self._remove()
            raise
        shards: list[dict[str, Any]] = []
        for number, index in enumerate(indexes):
            for shard in index:
                name = f"{self.settings.split}-{len(shards):05d}.tar"
                if (made := self.path(number) / shard["name"]).exists():  # else it was moved before an interruption
                    os.replace(made, self.output / name)
                shards.append({**shard, "name": name})
        write_index(self.output, self.settings.split, shards)
        self._remove()
        return outcome

    def _check_same_plan(self, plan: dict[str, Any]) -> None:
        if _loaded(self._plan_file) != plan:
            raise DataError(
                f"{self.folder} is an unfinished conversion of other records or with other settings: repeat that "
                "command, or delete the folder"
            )

    def _check_no_shards(self) -> None:
        if (self.output / INDEX_NAME).exists() or any(self.output.glob("*.tar")):
            raise DataError(f"{self.output} already has shards: give an empty folder, or delete it first")

    def _start(self, plan: dict[str, Any]) -> None:
        for leftover in (self.folder, self.output / _REMOVED):
            shutil.rmtree(leftover, ignore_errors=True)
        for listing in (REJECTED_NAME, NOTES_NAME):
            (self.output / listing).unlink(missing_ok=True)
        self.folder.mkdir(parents=True)
        write_json(self._plan_file, plan)

    def _remove(self) -> None:
        """Remove all parts. Renamed first, because a repeated command would continue from those that are left."""
        removed = self.output / _REMOVED
        self.folder.rename(removed)
        shutil.rmtree(removed)


def make_part(folder: Path, records: Sequence[Record], settings: Settings, progress: Callable[[int], Any]) -> None:
    """Check and write the records of one part. Calls `progress(n)` after every n records."""
    shutil.rmtree(folder, ignore_errors=True)
    rejected: list[dict[str, str]] = []
    notes: list[dict[str, str]] = []
    with ShardWriter(folder, settings.split, settings.samples_per_shard, settings.bytes_per_shard) as writer:
        for record in records:
            found = check(record, settings.source, settings.reencoding)
            if isinstance(found, Checked):
                writer.write(found.identifier, found.media, found.media_type, found.text, found.meta)
                notes += ({"id": found.identifier, "note": note} for note in found.notes)
            else:
                rejected.append({"id": found.identifier, "reason": found.reason, "detail": found.detail})
            progress(1)
        for name, rows in ((REJECTED_NAME, rejected), (NOTES_NAME, notes)):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(folder / name, lines.encode("utf-8", "replace"))


def fingerprint(records: Sequence[Record]) -> str:
    """Hash of all annotations."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode("utf-8", "replace"))
    return digest.hexdigest()


def _check_keys(records: Sequence[Record]) -> None:
    owners: dict[str, int] = {}
    for number, record in enumerate(records):
        key = sample_key(record.identifier)
        if (owner := owners.setdefault(key, number)) != number:
            places = " and ".join(_place(records[one], one) for one in (owner, number))
            raise DataError(f"two records have the key {key!r} ({places}): identifiers must be unique")


def _place(record: Record, number: int) -> str:
    media = getattr(record.media, "name", "without media")
    return f"number {number + 1}, {media}, with identifier {record.identifier!r}"


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"


def _check_budget(outcome: Outcome, max_rejected: float) -> None:
    rejected = outcome.reasons.total()
    where = f"; they are listed in {outcome.listing}" if rejected else ""
    if outcome.written == 0:
        if not rejected:
            raise DataError("no records: the annotations name no image or video, or filters leave none")
        raise DataError(f"no record could be used ({rejected} rejected: {outcome.summary()}){where}")
    fraction = rejected / (rejected + outcome.written)
    if fraction > max_rejected:
        raise DataError(
            f"{rejected} of {rejected + outcome.written} records were rejected ({outcome.summary()}): {fraction:.1%} "
            f"is more than --max-rejected {max_rejected:g}{where}"
        )


def _loaded(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged: delete {path.parent} and convert again") from error
