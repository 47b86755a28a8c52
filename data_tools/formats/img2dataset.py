"""Downloads of img2dataset: tars of images, captions and metadata (LAION, CC3M, CC12M, COYO, DataComp)."""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_tools.formats import Record, Stored
from data_tools.formats.filters import Filters, add_filter_argument
from data_tools.formats.tables import existing_folder
from dsmoe_vl.data.media_kind import HEAD, media_kind
from dsmoe_vl.data.sample import IMAGE_EXTENSIONS
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

`url`, the licence, `original_width` and `original_height` are kept, and all other columns in one object, `img2dataset`.
Samples before the damage of a damaged tar are used.

Example:

    python -m data_tools.convert img2dataset --shards laion --filter "punsafe<=0.5" --filter "original_width>=256" \\
        --output shards/laion
"""

# About the download itself, or determined again from the image.
DROPPED = ("caption", "sha256", "status", "error_message", "width", "height")
KEPT = ("url", "original_width", "original_height")
LICENCE_COLUMNS = ("licence", "license", "LICENCE", "LICENSE")
_TEXTS = ("json", "txt")


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
    folder = existing_folder(arguments.shards, "--shards")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"--shards {folder}: no *.tar in it; img2dataset writes them with output_format=webdataset")
    for tar in tars:
        yield from _records(tar, filters)
    filters.check(f"the .json files in {folder}")


def _records(tar: Path, filters: Filters) -> Iterator[Record]:
    scan = scan_shard(tar)
    keys: set[str] = set()
    for start, end in pairwise(scan.bounds.tolist()):
        try:
            key, files, _ = read_files(tar, start, end, _TEXTS)
            if key in keys:
                raise DataError(f"repeated key: {tar}: {key} is the key of two samples")
            row, text = _annotations(tar, key, files)
        except DataError as error:
            yield Record(f"{tar.name} byte {start}", "image", None, [], problem=str(error))
            continue
        keys.add(key)
        if not filters.accept(row):
            continue
        media = _media(tar, start, end)
        problem = "" if media else f"no image: {tar}: {key}"
        # Keys begin with the number of their tar, which two downloads in one folder may share.
        yield Record(f"{tar.stem}-{key}", "image", media, [text or row.get("caption")], _meta(row), problem)
    if scan.damage:
        yield Record(tar.name, "image", None, [], problem=f"damaged shard: {tar}: {scan.damage}")


def _annotations(tar: Path, key: str, files: dict[str, bytes]) -> tuple[dict[str, Any], str]:
    """The contents of KEY.json and of KEY.txt. Raises DataError."""
    try:
        row, text = json.loads(files.get("json", b"{}")), files.get("txt", b"").decode("utf-8-sig").strip()
    except ValueError as error:
        raise DataError(f"malformed text or JSON: {tar}: {key}: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"malformed text or JSON: {tar}: {key}.json is not an object")
    return row, text


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    """The columns to keep. The others go into an object, as their names may have a meaning here: `tasks`, `content`."""
    known = {name: value for name, value in row.items() if value is not None and value == value}  # NaN: none
    licence = next((known[name] for name in LICENCE_COLUMNS if name in known), None)
    others = {name: known[name] for name in known if name not in (*DROPPED, *KEPT, *LICENCE_COLUMNS)}
    return {**{name: known.get(name) for name in KEPT}, "licence": licence, NAME: others or None}


def _media(tar: Path, start: int, end: int) -> Stored | None:
    """The medium of the sample in the bytes [start, end), found by the headers, or by the first bytes of files with
    unusual names; None if there is none."""
    with tar.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as members:
            for member in members:
                if member.offset >= end:
                    return None
                extension = member.name.rpartition("/")[2].partition(".")[2].lower()
                if extension in _TEXTS or not member.isreg() or member.issparse():
                    continue
                stored = Stored(tar, member.offset_data, member.size, member.name)
                if extension in IMAGE_EXTENSIONS or media_kind(stored.read_bytes(HEAD)) is not None:
                    return stored
    return None
