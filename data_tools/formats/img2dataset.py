"""Tars of other tools: downloads of img2dataset (LAION, CC3M, CC12M, COYO, DataComp) and any WebDataset."""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_tools.formats import Record, Stored
from data_tools.formats.filters import Filters, add_filter_argument
from dsmoe_vl.data.contents import contents_of, several
from dsmoe_vl.data.media_kind import HEAD, media_kind
from dsmoe_vl.data.sample import EXTENSIONS, MEDIA_EXTENSIONS, SPEECH_EXTENSIONS, TEXT_EXTENSIONS, Sample, split_name
from dsmoe_vl.data.shards.habits import NAME_RULE, tars_missing
from dsmoe_vl.data.shards.index import TarSample, parsed
from dsmoe_vl.data.shards.tar import read_files, scan_shard
from dsmoe_vl.errors import DataError

NAME = "img2dataset"
HELP = "output folder of img2dataset (LAION, CC3M, CC12M, COYO, DataComp)"
DESCRIPTION = """\
Expected files (img2dataset with output_format=webdataset):

    laion/
      00000.tar             000000012.jpg       an image; numbers of failed downloads are missing
                            000000012.txt       the caption
                            000000012.json      {"url": ..., "original_width": 640, "punsafe": 0.02, ...}
      00000.parquet         not read: the .json files have the same content

Other WebDataset tars are read too, with the captions, the image or video and the recording that training would use, and
images and videos of other formats. `url`, the licence, `original_width` and `original_height` are kept, and all other
columns in one object, `img2dataset`.
Samples before the damage of a damaged tar are used.

Example:

    python -m data_tools.convert img2dataset --shards laion --filter "punsafe<=0.5" --filter "original_width>=256" \\
        --output shards/laion
"""

# About the download itself, or determined again from the image.
DROPPED = ("caption", "captions", "sha256", "status", "error_message", "width", "height")
KEPT = ("url", "original_width", "original_height")
LICENCE_COLUMNS = ("licence", "license", "LICENCE", "LICENSE")
_SET_ASIDE = ("unknown task", "no summary")  # flaws of columns that the object `img2dataset` gets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--shards` and `--filter`."""
    parser.add_argument("--shards", type=Path, required=True, metavar="DIR", help="folder of the tars")
    add_filter_argument(parser, "the columns of KEY.json")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per sample that the filters accept, in the order of the tars' names, and one per damaged tar.

    Raises DataError if the folder is missing or has no tars, or a tar cannot be opened; after all samples, if none has
    the column of a filter.
    """
    filters = Filters(arguments.filter)
    folder: Path = arguments.shards
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"--shards {tars_missing(folder)}; img2dataset writes them with output_format=webdataset")
    for tar in tars:
        yield from _records(tar, filters)
    filters.check(f"the .json files in {folder}")


def _records(tar: Path, filters: Filters) -> Iterator[Record]:
    """The samples of a tar as training would read them, but with media of any name and format."""
    scan = scan_shard(tar)
    keys: set[str] = set()
    for start, end in pairwise(scan.bounds.tolist()):
        place = f"{tar.name} byte {start}"
        try:
            files = read_files(tar, start, end, TEXT_EXTENSIONS)
            sample = parsed(TarSample(files, tar, files.key in scan.scattered))
        except DataError as error:
            yield Record(place, "image", None, [], problem=str(error))
            continue
        if not filters.accept(sample.meta):
            continue
        record = _record(tar, sample, _members(tar, start, end))
        if not record.problem and sample.key in keys:
            record = replace(record, problem=f"repeated key: {tar}: {sample.key} is the key of two samples")
        if record.problem:
            yield replace(record, identifier=place)
        else:
            keys.add(sample.key)
            yield record
    if scan.ignored and not scan.samples:
        yield Record(
            tar.name, "image", None, [], problem=f"no samples: {tar}: {scan.ignored} belongs to none; {NAME_RULE}"
        )
    if scan.damage:
        yield Record(tar.name, "image", None, [], problem=f"damaged shard: {tar}: {scan.damage}")


def _record(tar: Path, sample: Sample, members: list[Stored]) -> Record:
    contents = contents_of(sample)
    media = [one for one in members if _extension(one) in MEDIA_EXTENSIONS] or [
        one for one in members if _extension(one) not in EXTENSIONS and media_kind(one.read_bytes(HEAD))
    ]
    recording = next((one for one in members if _extension(one) in SPEECH_EXTENSIONS), None)
    notes = [flaw for flaw in contents.flaws if not flaw.startswith(_SET_ASIDE)]
    if len(media) > 1 and _extension(media[0]) not in MEDIA_EXTENSIONS:
        notes.append(several("image or video", [one.name for one in media]))
    problem = ""
    if not media and recording is None:
        problem = contents.no_media
    elif not contents.texts and not (media and recording):
        problem = contents.no_caption
    kind, _, detail = problem.partition(": ")
    meta = _meta(sample.meta)
    if contents.transcript and "transcript" in sample.meta:
        meta["transcript"] = contents.transcript
    # Keys begin with the number of their tar, which two downloads in one folder may share.
    return Record(
        f"{tar.stem}-{sample.key}",
        (media_kind(media[0].read_bytes(HEAD)) if media else None) or "image",
        media[0] if media and not problem else None,
        list(contents.captions),
        meta,
        f"{kind}: {tar}: {detail}" if problem else "",
        None if problem else recording,
        tuple(notes),
    )


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    """The columns to keep. The others go into an object, as their names may have a meaning here: `tasks`, `content`."""
    known = {name: value for name, value in row.items() if value is not None and value == value}  # NaN: none
    licence = next((known[name] for name in LICENCE_COLUMNS if name in known), None)
    others = {name: known[name] for name in known if name not in (*DROPPED, *KEPT, *LICENCE_COLUMNS)}
    return {**{name: known.get(name) for name in KEPT}, "licence": licence, NAME: others or None}


def _members(tar: Path, start: int, end: int) -> list[Stored]:
    """The files in the bytes [start, end) of a tar, by their headers."""
    found: list[Stored] = []
    with tar.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as members:
            for member in members:
                if member.offset >= end:
                    break
                if member.isreg() and not member.issparse() and split_name(member.name)[0]:
                    found.append(Stored(tar, member.offset_data, member.size, member.name))
    return found


def _extension(member: Stored) -> str:
    return split_name(member.name)[1]
