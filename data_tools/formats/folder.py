"""A folder of images, videos and recordings of speech, with their texts in a table or in text files beside them."""

from __future__ import annotations

import argparse
import json
import posixpath
from collections.abc import Iterator
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from data_tools.formats import IsMeant, Record, with_ending
from data_tools.formats.filters import Filters, add_filter_argument
from data_tools.formats.identifiers import identifier, identifier_text
from data_tools.formats.tables import existing_folder, read_rows, require_columns
from data_tools.formats.text_files import records_beside_text, unused_beside_text
from data_tools.recordings import is_recording
from dsmoe_vl.data.media_kind import NO_MEDIA, Kind, kind_of_file
from dsmoe_vl.data.sample import MEDIA_EXTENSIONS, SPEECH_EXTENSIONS
from dsmoe_vl.errors import DataError

NAME = "folder"
HELP = "a folder of images, videos and recordings, with a csv, tsv, jsonl or parquet table or text files"
DESCRIPTION = """\
Expected files, with a table (.csv, .tsv, .jsonl or .parquet):

    clips/
      texts.csv              file,text                      or texts.jsonl, an object per line:
                             kitchen/a.mp4,a man cooks        {"file": "kitchen/a.mp4", "text": "a man cooks"}
                             b.jpg,"two dogs, running"        {"file": "b.jpg", "text": ["two dogs", "dogs run"]}
      kitchen/a.mp4          a video: MP4, WebM, Matroska, AVI, MOV, 3GP, MPEG, FLV or ASF
      b.jpg                  an image: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000

or without one, with one caption per line in text files:

    photos/
      2024/c.jpg
      2024/c.txt
      2024/c.flac            speech that goes with c.jpg: FLAC, WAV, MP3 or Opus; c.txt may then be missing
      2024/d.wav             speech alone,
      2024/d.txt             and its words

What a file is, its content decides. A name in a table may lack the ending, such as .jpg. Links to folders are
followed, hidden files are not used.

Several rows of one file are several captions; other columns are taken from the first of them. Known columns: file,
recording (a file of speech that goes with it, or is there alone if file is empty), text, transcript (the words of the
recording; without it they are the only text), id (instead of the file's path), url, licence, summary (a text),
importance (a list of numbers from 0 to 1, one for each equal part of a video) and saliency (a list of such lists, one
per annotator). In csv and tsv the lists are JSON. --map text=caption names another column, --map id= ignores the
column id.

Examples:

    python -m data_tools.convert folder --media clips --table clips/texts.csv --output shards/clips
    python -m data_tools.convert folder --media clips --table meta.parquet --map file=path --map text=caption \\
        --keep camera --filter "score>=0.3" --output shards/clips
    python -m data_tools.convert folder --media photos --output shards/photos
"""

LABELS: dict[str, type] = {"summary": str, "importance": list, "saliency": list, "transcript": str}
FIELDS = ("file", "text", "id", "recording", "url", "licence", *LABELS)
_INSTEAD_OF_TEXT = {"summary", "importance", "saliency", "recording"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--media`, `--table`, `--map`, `--keep` and `--filter`."""
    parser.add_argument(
        "--media", type=Path, required=True, metavar="DIR", help="folder of the images, videos and recordings"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="their texts; without a table they are in NAME.txt")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"the column of {', '.join(FIELDS)} (default: of the same name; FIELD= for none)",
    )
    parser.add_argument("--keep", action="append", default=[], metavar="COLUMN", help="copy it to KEY.json")
    add_filter_argument(parser, "the table's columns")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per file, in the order of first mention in the table; without a table, sorted by path.

    Raises DataError if the table is missing, malformed or lacks a column, an id belongs to two files, an option is
    malformed, or the folder is missing.
    """
    folder = existing_folder(arguments.media, "--media")
    if arguments.table:
        yield from _in_table(folder, arguments)
    elif arguments.map or arguments.keep or arguments.filter:
        raise DataError("--map, --keep and --filter need a table: name it with --table FILE")
    else:
        yield from records_beside_text(folder)


def unused(arguments: argparse.Namespace) -> str:
    """What is in the folder and becomes no record, counted and named; "" with a table, which names the files."""
    return "" if arguments.table else unused_beside_text(arguments.media)


def _in_table(folder: Path, arguments: argparse.Namespace) -> Iterator[Record]:
    path: Path = arguments.table
    filters, mapped = Filters(arguments.filter), _parse_map(arguments.map)
    rows = read_rows(path, "--table")
    known = dict.fromkeys(column for _, row in rows for column in row)
    options = {column: f"--map {field}={column}" for field, column in mapped.items() if column}
    options |= {column: f"--keep {column}" for column in arguments.keep}
    for column, option in options.items():
        if rows and column not in known:
            raise DataError(f"{option}: no column {column!r} in {path}; there are {', '.join(known)}")
    columns = {field: column for field in FIELDS if (column := mapped.get(field, field)) in known}
    if "recording" not in columns:
        require_columns(rows, path, {mapped.get("file") or "file": "--map file=COLUMN"})
    if not columns.keys() & _INSTEAD_OF_TEXT:
        require_columns(rows, path, {mapped.get("text") or "text": "--map text=COLUMN"})

    found: dict[str, Record] = {}
    nameless = []
    for line, row in rows:
        if not filters.accept(row):
            continue
        name, recording = (_name(row, columns.get(field, "")) for field in ("file", "recording"))
        if not name and not recording:
            asked = " and ".join(repr(columns[field]) for field in ("file", "recording") if field in columns)
            problem = f"no file: {path}, line {line}: {asked} {'are' if ' and ' in asked else 'is'} empty"
            nameless.append(Record(f"{path.name} line {line}", "image", None, [], problem=problem))
            continue
        own = name or recording
        if own not in found:
            found[own] = _record(folder, name, recording, line, row, columns, arguments.keep)
        text = row.get(columns.get("text", ""))
        found[own].captions.extend(text if isinstance(text, list) else [text])
    filters.check(str(path))
    owners: dict[str, str] = {}
    for name, record in found.items():
        if owners.setdefault(record.identifier, name) != name:
            raise DataError(
                f"--map id={columns['id']}: {path} gives {owners[record.identifier]} and {name} the same id, "
                f"{record.identifier!r}: name a column of unique ids, or none by --map id="
            )
    yield from found.values()
    yield from nameless


def _name(row: dict[str, Any], column: str) -> str:
    """The file that a row names in a column, "" if none."""
    name = (identifier_text(row.get(column)) or "").strip()
    return posixpath.normpath(name) if name else ""


def _record(
    folder: Path, name: str, recording: str, line: int, row: dict[str, Any], columns: dict[str, str], keep: list[str]
) -> Record:
    """The record of a file, a recording or both (names, "" for none) from its first row, without captions."""
    values = {field: _as_json(row.get(column)) for field, column in columns.items()}
    meta = {column: _as_json(row.get(column)) for column in keep}
    meta |= {field: value for field, value in values.items() if field in ("url", "licence", *LABELS)}
    kind, problem = None, ""
    path = _file(folder, name, MEDIA_EXTENSIONS, kind_of_file)
    spoken = _file(folder, recording, SPEECH_EXTENSIONS, is_recording)
    for one in filter(None, (name, recording)):
        if one.startswith(("/", "../")) or one in (".", ".."):
            problem = f"outside of the folder: {one} is not in {folder}"
    if path and not problem and (kind := _kind(path)) is None:
        problem = f"unknown kind: {name} is {NO_MEDIA}"
        if is_recording(path):
            problem += "; name a recording of speech in the column 'recording' (--map recording=COLUMN)"
    for field, kind_of_value in LABELS.items():
        value = meta.get(field)
        try:
            if kind_of_value is list and isinstance(value, str):  # in a cell of csv
                meta[field] = value = json.loads(value)
            if not isinstance(value, kind_of_value | None):
                raise ValueError(f"{value!r} is not a {kind_of_value.__name__}")
        except ValueError as error:
            problem = problem or f"malformed {field}: line {line}: {error}"
    given = values.get("id")
    own = (name or recording) if given is None else identifier(given, f"--table, line {line}, {columns['id']!r}")
    if problem:
        path = spoken = None
    return Record(own, kind or "image", path, [], meta, problem, spoken)


def _file(folder: Path, name: str, endings: tuple[str, ...], is_meant: IsMeant) -> Path | None:
    """The file `name` in a folder; if it is missing, one with an ending more, if there is one. None without a name."""
    if not name:
        return None
    path = folder / name
    return path if isfile(path) else with_ending(folder, name, endings, is_meant) or path  # False: an impossible name


def _kind(path: Path) -> Kind | None:
    """The kind of a file, as `kind_of_file`; a missing one is reported as such later."""
    return None if isdir(path) else kind_of_file(path)


def _parse_map(texts: list[str]) -> dict[str, str]:
    """The column of each field in `--map`, "" for none. Raises DataError."""
    columns = {}
    for text in texts:
        field, sign, column = (part.strip() for part in text.partition("="))
        if field not in FIELDS or not sign or (field == "file" and not column):
            raise DataError(f"--map {text}: write FIELD=COLUMN; fields are {', '.join(FIELDS)}")
        columns[field] = column
    return columns


def _as_json(value: Any) -> Any:
    """A cell as a JSON value: dates and the like as text, an empty cell and NaN as None."""
    if value is None or value == "" or value != value:
        return None
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value
