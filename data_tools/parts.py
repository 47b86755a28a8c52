"""A conversion in parts, which any number of processes and hosts can make, and which can be interrupted.

Part n has `samples_per_shard` records, from number n * samples_per_shard on. They lie in a file of their own, and
become a shard folder of their own, `OUTPUT/.unfinished/part-00000n/`. Its `index.json` is written last; a part without
it is made again. The bytes of a part do not depend on the process that makes it. When all parts are complete, `publish`
gives the shards their names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.check import Checked, Reencoding, check, size_notes
from data_tools.formats import Record
from data_tools.record_files import RecordFiles, read_records
from data_tools.writer import ShardWriter, check_split, write_index
from dsmoe_vl.data.shards.index import INDEX_NAME
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import replacing, write_atomically, write_json

REJECTED_NAME = "rejected.jsonl"
NOTES_NAME = "notes.jsonl"
_UNFINISHED = ".unfinished"
_REMOVED = ".removed"  # its name while it is removed
_PLAN_NAME = "conversion.json"
_RECORDS = "records"


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


class Part(NamedTuple):
    """A part that is to be made: its folder, and its records' file and their number."""

    folder: Path
    records: Path
    size: int


class Parts:
    """The parts of one conversion."""

    def __init__(self, output: Path, settings: Settings) -> None:
        self.output, self.settings = output, settings
        self.folder = output / _UNFINISHED
        self._plan_file = self.folder / _PLAN_NAME
        self._records = RecordFiles(self.folder / _RECORDS, settings.samples_per_shard)
        self._count = 0

    def open(self, records: Iterable[Record]) -> list[Part]:
        """Start the conversion, or continue an interrupted one of the same records. Returns the parts that are missing.

        Raises DataError if the folder has shards or another conversion, or if two records would have the same key, and
        what reading the annotations raises.
        """
        is_new, had_output = not self._plan_file.exists(), self.output.exists()
        if is_new:
            self._check_no_shards()
            self._clear()
        try:
            listed = self._records.write(records)
            plan = {"records": listed.fingerprint, **asdict(self.settings)}
            if not is_new:
                self._check_same_plan(plan)
        except BaseException:
            shutil.rmtree(self.folder if is_new else self._records.folder, ignore_errors=True)
            if not had_output:
                with suppress(OSError):
                    self.output.rmdir()
            raise
        if is_new:
            write_json(self._plan_file, plan)
        size = self.settings.samples_per_shard
        self._count = -(-listed.size // size)
        return [
            Part(self.path(number), self._records.path(number), min(size, listed.size - number * size))
            for number in range(self._count)
            if not (self.path(number) / INDEX_NAME).exists()
        ]

    def path(self, number: int) -> Path:
        """The folder of a part."""
        return self.folder / f"part-{number:06d}"

    def publish(self, max_rejected: float) -> Outcome:
        """Give all shards their final names, list what was rejected, write index.json and remove the parts.

        Can be repeated after an interruption. If more than the fraction `max_rejected` of the records was rejected, or
        none could be used, raises DataError and leaves only the list.
        """
        indexes = [_loaded(self.path(number) / INDEX_NAME)["shards"] for number in range(self._count)]
        listing, noted = self.output / REJECTED_NAME, self.output / NOTES_NAME
        reasons, notes = self._join(REJECTED_NAME, "reason"), self._join(NOTES_NAME, "note")
        written = sum(shard["samples"] for index in indexes for shard in index)
        outcome = Outcome(written, reasons, listing, notes, noted)
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

    def _join(self, name: str, field: str) -> Counter[str]:
        """The lists of all parts in one file, if they have lines. Returns how often each value of a field occurs."""
        counts: Counter[str] = Counter()
        for number in range(self._count):
            with (self.path(number) / name).open(encoding="utf-8") as part:
                counts.update(json.loads(line)[field] for line in part)
        if counts:
            with replacing(self.output / name) as joined, joined.open("wb") as file:
                for number in range(self._count):
                    file.write((self.path(number) / name).read_bytes())
        return counts

    def _check_same_plan(self, plan: dict[str, Any]) -> None:
        if _loaded(self._plan_file) != plan:
            raise DataError(
                f"{self.folder} is an unfinished conversion of other records or with other settings: repeat that "
                "command, or delete the folder"
            )

    def _check_no_shards(self) -> None:
        if (self.output / INDEX_NAME).exists() or any(self.output.glob("*.tar")):
            raise DataError(f"{self.output} already has shards: give an empty folder, or delete it first")

    def _clear(self) -> None:
        """Remove what an interrupted conversion has left that had not begun, or that was at its end."""
        for leftover in (self.folder, self.output / _REMOVED):
            shutil.rmtree(leftover, ignore_errors=True)
        for listing in (REJECTED_NAME, NOTES_NAME):
            (self.output / listing).unlink(missing_ok=True)

    def _remove(self) -> None:
        """Remove all parts. Renamed first, because a repeated command would continue from those that are left."""
        removed = self.output / _REMOVED
        self.folder.rename(removed)
        shutil.rmtree(removed)


def make_part(part: Part, settings: Settings, progress: Callable[[int], Any]) -> None:
    """Check and write the records of one part. Calls `progress(n)` after every n records."""
    folder, records = part.folder, read_records(part.records)
    shutil.rmtree(folder, ignore_errors=True)
    rejected: list[dict[str, str]] = []
    notes: list[dict[str, str]] = []
    with ShardWriter(folder, settings.split, settings.samples_per_shard, settings.bytes_per_shard) as writer:
        for record in records:
            found = check(record, settings.source, settings.reencoding)
            if isinstance(found, Checked):
                sizes = writer.write(
                    found.identifier,
                    found.media,
                    found.media_type,
                    found.text,
                    found.meta,
                    recording=found.recording,
                    recording_type=found.recording_type,
                )
                notes += ({"id": found.identifier, "note": note} for note in (*found.notes, *size_notes(sizes)))
                for note in record.notes:
                    kind, _, detail = note.partition(": ")
                    notes.append({"id": found.identifier, "note": kind, "detail": detail})
            else:
                rejected.append({"id": found.identifier, "reason": found.reason, "detail": found.detail})
            progress(1)
        for name, rows in ((REJECTED_NAME, rejected), (NOTES_NAME, notes)):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(folder / name, lines.encode("utf-8", "replace"))


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
