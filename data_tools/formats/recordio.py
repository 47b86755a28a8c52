"""Images in MXNet's RecordIO, as GluonCV's users have them, with captions in a file of their own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record
from data_tools.formats.caption_files import CaptionFile
from data_tools.formats.mxnet_records import Entry, Listed, read_index, read_list, read_records
from dsmoe_vl.data.media_kind import HEAD, media_kind
from dsmoe_vl.errors import DataError

NAME = "recordio"
HELP = "RecordIO of MXNet and GluonCV (.rec with .idx and .lst), with a file of captions"
DESCRIPTION = """\
Expected files, with one name but for their endings, as im2rec writes them:

    pascal/
      train.rec            images with a header each: labels and an id
      train.idx            0<TAB>0             key and place of each record; without the file, ids are the keys
      train.lst            0<TAB>3<TAB>cats/a.jpg       index, labels and path; only needed for captions by path
      captions.csv         index,text          or file,text; or tsv, jsonl, parquet
                           0,a cat on a mat
      or captions.json     {"0": "a cat on a mat", "cats/b.jpg": ["a cat", "a cat sleeps"]}

Without --captions they are what train.lst has between index and path and is no number. Numbers are labels of classes,
and those are no captions; they are kept in KEY.json. A record that is damaged is rejected, and the next one found.

Example:

    python -m data_tools.convert recordio --rec pascal/train.rec --captions pascal/captions.csv \\
        --output shards/pascal
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--rec` and `--captions`."""
    parser.add_argument(
        "--rec", type=Path, required=True, nargs="+", metavar="FILE", help=".rec files, their .idx and .lst beside"
    )
    parser.add_argument("--captions", type=Path, metavar="FILE", help="captions by index or path")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per record of the files, in their order, then one per key without a record.

    Raises DataError if a file is missing or malformed, or if no record has a caption.
    """
    captions = CaptionFile(arguments.captions, "--captions") if arguments.captions else None
    arguments.left = []  # for `unused`, which is called when all records are read
    known, has_texts = "", False
    for path in arguments.rec:
        keys = read_index(file) if (file := path.with_suffix(".idx")).exists() else None
        listed = read_list(file) if (file := path.with_suffix(".lst")).exists() else {}
        unnamed, places = 0, frozenset(keys or ())
        for entry in read_records(path, places):
            key = str(entry.number) if keys is None else keys.pop(entry.offset, "")
            if entry.payload is None:
                yield Record(f"{path} byte {entry.offset}", "image", None, [], problem=entry.problem)
                continue
            if not key:
                unnamed += 1
                continue
            line = listed.get(key)
            names = [key, line.file] if line else [key]
            texts = captions.of(names) if captions else line.texts if line else []
            known, has_texts = names[-1], has_texts or bool(texts)
            yield _record(key, entry, line, texts)
        for place, key in (keys or {}).items():
            problem = f"no record: {path.with_suffix('.idx')} has {key!r} at byte {place}, where none begins"
            yield Record(f"{path} key {key}", "image", None, [], problem=f"{problem}: write it with rec2idx")
        if unnamed:
            arguments.left.append(f"{unnamed} records of {path.name} that its .idx does not name")
    if captions:
        captions.require_use(known)
        arguments.left.append(captions.unused())
    elif not has_texts:
        raise DataError(
            f"--rec {arguments.rec[0]}: no captions: a .lst file beside it has none between index and path; "
            "name a file that has them with --captions"
        )


def unused(arguments: argparse.Namespace) -> str:
    """Records without a key, and captions without a record; "" without any."""
    return ", ".join(filter(None, arguments.left))


def _record(key: str, entry: Entry, line: Listed | None, texts: list[Any]) -> Record:
    assert entry.payload is not None
    own = {"file": line.file if line else None, "label": entry.labels[0] if len(entry.labels) == 1 else entry.labels}
    try:
        kind = media_kind(entry.payload.read_bytes(HEAD)) or "image"
    except OSError as error:
        return Record(key, "image", None, texts, problem=f"damaged record: {entry.payload}: {error}")
    return Record(key, kind, entry.payload, texts, {NAME: own})
