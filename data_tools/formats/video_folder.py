"""A folder of videos and a table that gives each its text."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record
from dsmoe_vl.errors import DataError

NAME = "videos"
HELP = "a folder of videos and a csv or jsonl file of texts"
DESCRIPTION = """\
Expected files:

    clips/
      texts.csv              file,text                      or texts.jsonl, an object a line:
                             kitchen/a.mp4,a man cooks        {"file": "kitchen/a.mp4", "text": "a man cooks"}
                             b.mkv,"two dogs, running"        {"file": "b.mkv", "text": ["two dogs", "dogs run"]}
      kitchen/a.mp4          mp4, webm, mkv or avi
      b.mkv

Several rows of one file are several captions of it.

Example:

    python -m data_tools.convert videos --videos clips --texts clips/texts.csv --output shards/clips
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos`, `--texts`, `--file-column` and `--text-column`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the videos")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="csv or jsonl, named so")
    parser.add_argument("--file-column", default="file", metavar="NAME", help="path inside of DIR (%(default)s)")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="a caption, or a list (%(default)s)")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record a file, in the order of first mention.

    Raises DataError where the table is missing, malformed or lacks a column, or the folder is missing.
    """
    path: Path = arguments.texts
    if not arguments.videos.is_dir():
        raise DataError(f"--videos {arguments.videos}: no such folder")
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"--texts {path}: the name must end in .csv or .jsonl")
    try:
        rows = readers[path.suffix.lower()](path.read_text(encoding="utf-8-sig"), path)
    except OSError as error:
        raise DataError(f"--texts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--texts {path}: not UTF-8: {error}") from error

    captions: dict[str, list[Any]] = {}
    for line, row in rows:
        for option, column in (("--file-column", arguments.file_column), ("--text-column", arguments.text_column)):
            if column not in row:
                raise DataError(
                    f"{path}, line {line}: no {column!r} among {', '.join(row) or 'no columns'}: name it with {option}"
                )
        name, text = row[arguments.file_column], row[arguments.text_column]
        captions.setdefault(str(name), []).extend(text if isinstance(text, list) else [text])
    for name, texts in captions.items():
        yield Record(name, "video", arguments.videos / name, texts)


def _csv_rows(content: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of a comma-separated table with a header; cells that are missing are None."""
    reader = csv.DictReader(io.StringIO(content, newline=""), skipinitialspace=True, strict=True)
    try:
        header = reader.fieldnames
        if not header:
            raise DataError(f"--texts {path}: empty; its first line must name the columns")
        reader.fieldnames = [name.strip() for name in header]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f"--texts {path}, line {reader.reader.line_num}: {error}") from error
    for line, row in rows:
        if None in row:
            raise DataError(f"--texts {path}, line {line}: more cells than columns; a text with a comma needs quotes")
    return rows


def _jsonl_rows(content: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, object) of every line that is not blank."""
    rows = []
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"--texts {path}, line {line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"--texts {path}, line {line}: an object is expected, not {text[:40]!r}")
        rows.append((line, row))
    return rows
