"""Check a folder of shards: print statistics of its samples, and list damaged, missing and unreadable ones.

Also reads shards of other tools (img2dataset, video2dataset, any WebDataset), without a manifest and KEY.json.
The exit status is 0 without problems, 1 with problems, 2 without shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data_tools.parallel import default_workers, ordered_map
from data_tools.schema import is_own, problems
from dsmoe_vl.command import run
from dsmoe_vl.console import printable, tell
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.decode import pictures_of
from dsmoe_vl.data.recording import SAMPLE_RATE, decode_recording
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.habits import NAME_RULE, tars_missing
from dsmoe_vl.data.shards.index import INDEX_NAME, Shard, ShardIndex, read_sample
from dsmoe_vl.data.shards.tar import scan_shard
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.drawing.contact_sheet import Cell, contact_sheet
from dsmoe_vl.drawing.picture_file import format_of, save_picture
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

FRAMES = 6  # of a video that are decoded and shown
SHEET_CELLS = 48
EXAMPLES = 3  # that are shown of each kind of problem
BAR = 40  # characters


@dataclass
class Report:
    """Statistics and problems of a shard folder. `problems`: kind -> the places where it occurs."""

    samples: int = 0
    shards: int = 0
    total_bytes: int = 0
    media_types: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)  # that samples can be used for
    foreign: int = 0  # samples written by other tools
    lengths: list[int] = field(default_factory=list)  # of captions, in `unit`
    unit: str = "words"
    kib: list[int] = field(default_factory=list)  # of the media
    recordings: Counter[str] = field(default_factory=Counter)  # by type
    speech_seconds: float = 0.0  # of the recordings that can be decoded
    transcripts: int = 0
    sides: list[int] = field(default_factory=list)  # pixels, the longer side of images and videos
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    cells: list[Cell] = field(default_factory=list)

    def add_error(self, error: DataError, where: str = "") -> None:
        """Add an error. Its kind is the beginning of its message, up to the colon."""
        kind, _, detail = str(error).partition(": ")
        self.problems[kind].append(": ".join(part for part in (where, detail) if part))


@dataclass(frozen=True)
class Look:
    """A sample and its errors. `sample` is None if it could not be read."""

    sample: Sample | None
    pictures: list[Image.Image]
    errors: list[tuple[str, DataError]]  # where, what
    speech_seconds: float = 0.0


def inspect(folder: Path, limit: int | None = None, tokenizer: Tokenizer | None = None) -> Report:
    """Read and decode the samples of a folder, or the first `limit` of them, and compare all tars with `index.json`.

    Captions are measured in pieces of `tokenizer`, or in words. Raises DataError if there are no tars.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit}: must be positive")
    report = Report(unit="tokens" if tokenizer else "words")
    measure: Callable[[str], Sized] = tokenizer.encode if tokenizer else str.split
    index = _scan(folder, report)
    has_manifest = _compare_with_manifest(index, report)
    places = [(shard, sample) for shard, row in enumerate(index.shards) for sample in range(row.samples)][:limit]
    sheet_every = -(-len(places) // SHEET_CELLS)
    seen: set[str] = set()
    looks = ordered_map(lambda place: _look(index, *place), places, default_workers())
    shown = tqdm(looks, total=len(places), desc=printable(str(folder)), unit="sample", disable=None)
    for number, look in enumerate(shown):
        for where, error in look.errors:
            report.add_error(error, where)
        if look.sample is None:
            continue
        if look.sample.key in seen:
            report.problems["duplicate key"].append(look.sample.key)
        seen.add(look.sample.key)
        report.samples += 1
        without_media = "text only" if look.sample.recording is None else "recording only"
        report.media_types[look.sample.media_type or without_media] += 1
        contents = contents_of(look.sample)
        report.recordings.update([look.sample.recording_type] if look.sample.recording is not None else [])
        report.speech_seconds += look.speech_seconds
        report.transcripts += bool(contents.transcript)
        report.tasks.update(contents.tasks)
        report.foreign += not is_own(look.sample)
        report.lengths.extend(len(measure(caption)) for caption in contents.captions)
        if look.sample.media is not None:
            report.kib.append(len(look.sample.media) // 1024)
        if look.pictures:
            report.sides.append(max(look.pictures[0].size))
            if number % sheet_every == 0:
                text = next(iter(contents.captions), "")
                report.cells.append(Cell(_thumbnails(look.pictures), text))
    if not has_manifest and report.foreign < report.samples:
        report.problems[f"no {INDEX_NAME}"].append(f"{folder}: changed or lost shards cannot be noticed")
    return report


def _scan(folder: Path, report: Report) -> ShardIndex:
    """The shards on disk, without the manifest."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        scan = scan_shard(path)
        if scan.damage:
            report.problems["damaged shard"].append(f"{path.name}: {scan.damage}; {scan.samples} samples before that")
        if scan.ignored and not scan.samples:
            report.problems["no samples"].append(f"{path.name}: {scan.ignored} belongs to none; {NAME_RULE}")
        shards.append(Shard(path.name, scan.samples, path.stat().st_size, _file_sha256(path)))
    if not shards:
        raise DataError(tars_missing(folder))
    report.shards, report.total_bytes = len(shards), sum(shard.bytes for shard in shards)
    return ShardIndex(folder, "", tuple(shards))


def _compare_with_manifest(index: ShardIndex, report: Report) -> bool:
    """Returns whether there is a manifest."""
    path = index.folder / INDEX_NAME
    if not path.exists():
        return False
    try:
        rows = {row["name"]: row for row in json.loads(require_regular(path).read_bytes())["shards"]}
        expected = {name: Shard(name, row["samples"], row["bytes"], row["sha256"]) for name, row in rows.items()}
    except (ValueError, TypeError, KeyError) as error:
        report.problems[f"malformed {INDEX_NAME}"].append(f"{path}: {error!r}")
        return True
    found = {shard.name: shard for shard in index.shards}
    for name in sorted(expected.keys() - found.keys()):
        report.problems["missing shard"].append(f"{name} is in {INDEX_NAME} only")
    for name in sorted(found.keys() - expected.keys()):
        report.problems["unlisted shard"].append(f"{name} is not in {INDEX_NAME}")
    for name in sorted(found.keys() & expected.keys()):
        for attribute in ("samples", "bytes", "sha256"):
            is_now, was = getattr(found[name], attribute), getattr(expected[name], attribute)
            if is_now != was:
                report.problems[f"{attribute} differ from {INDEX_NAME}"].append(f"{name}: {is_now}, not {was}")
    return True


def _look(index: ShardIndex, shard: int, number: int) -> Look:
    place = f"{index.shards[shard].name}, sample {number}"
    try:
        sample = read_sample(index, shard, number)
    except DataError as error:
        return Look(None, [], [(place, error)])
    errors = [DataError(problem) for problem in problems(sample)]
    pictures: list[Image.Image] = []
    seconds = 0.0
    try:
        if sample.media is not None:
            pictures = [Image.fromarray(pixels) for pixels in pictures_of(sample, FRAMES)]
    except DataError as error:
        errors.append(error)
    try:
        if sample.recording is not None:
            seconds = len(decode_recording(sample.recording, index.data.speech_max_seconds)) / SAMPLE_RATE
    except DataError as error:
        errors.append(error)
    return Look(sample, pictures, [(f"{place}, {sample.key}", error) for error in errors], seconds)


def _thumbnails(pictures: list[Image.Image]) -> list[Image.Image]:
    """Small copies, because many are kept."""
    copies = [picture.copy() for picture in pictures]
    for copy in copies:
        copy.thumbnail((320, 320))
    return copies


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    yield f"{report.samples} samples read, {report.shards} shards, {report.total_bytes / 2**20:.1f} MiB"
    yield "media: " + (", ".join(f"{count} {name}" for name, count in report.media_types.most_common()) or "none")
    yield "for: " + (", ".join(f"{task} {count}" for task, count in sorted(report.tasks.items())) or "none")
    if report.recordings:
        kinds = ", ".join(f"{count} {name}" for name, count in report.recordings.most_common())
        yield f"recordings: {kinds}; {report.speech_seconds:.1f} s of speech, {report.transcripts} transcripts"
    if report.foreign:
        yield f"{report.foreign} samples of another tool; `convert img2dataset` would add the missing metadata"
    yield from _histogram(f"caption length, {report.unit}", report.lengths)
    yield from _histogram("longer side, pixels", report.sides)
    yield from _histogram("media size, KiB", report.kib)
    if not report.problems:
        yield "no problems"
    for kind, places in sorted(report.problems.items(), key=lambda item: -len(item[1])):
        yield f"problem: {len(places)} x {kind}"
        yield from (f"    {place}" for place in places[:EXAMPLES])


def _histogram(title: str, values: list[int]) -> Iterator[str]:
    """Counts in buckets that double: 0, 1, 2-3, 4-7, ..."""
    if not values:
        return
    yield f"{title}: least {min(values)}, mean {sum(values) / len(values):.1f}, greatest {max(values)}"
    buckets = Counter(value.bit_length() for value in values)
    for bucket in range(min(buckets), max(buckets) + 1):
        low, high = 2**bucket // 2, 2**bucket - 1
        label = f"{low}-{high}" if high > low else f"{high}"
        bar = "#" * round(BAR * buckets[bucket] / max(buckets.values()))
        yield f"{label:>14} {buckets[bucket]:>8} {bar}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder of tars")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help=f"draw up to {SHEET_CELLS} samples")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="measure captions in its tokens, not in words")
    parser.add_argument("--limit", type=int, metavar="N", help="decode the first N samples only")
    given = parser.parse_args(arguments)

    def command() -> int:
        sheet: Path | None = given.contact_sheet
        form = format_of(sheet, "--contact-sheet") if sheet else ""
        tokenizer = Tokenizer(given.tokenizer) if given.tokenizer else None
        report = inspect(given.shards, given.limit, tokenizer)
        print(*map(printable, describe(report)), sep="\n")
        if sheet and report.cells:
            sheet.parent.mkdir(parents=True, exist_ok=True)
            save_picture(contact_sheet(report.cells), sheet, form)
            tell(f"wrote {sheet}: {len(report.cells)} samples")
        return 1 if report.problems else 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
