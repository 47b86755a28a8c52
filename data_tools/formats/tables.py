"""Annotation files: JSON, and rows of CSV, TSV, JSON lines and Parquet. Errors name option, file and line."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

csv.field_size_limit(2**27)  # characters of a cell; Python's 131,072 are too few for an importance curve

Row = tuple[int, dict[str, Any]]  # line number, from 1; values by column
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_text(path: Path, option: str) -> str:
    """The whole file, without a byte-order mark. Raises DataError."""
    try:
        return require_regular(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{option} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{option} {path}: not UTF-8: {error}") from error


def read_json(path: Path, option: str, unique_keys: bool = False) -> Any:
    """The value in a JSON file. Raises DataError; with `unique_keys` also if a key occurs twice in an object, of which
    Python would keep the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = Counter(key for key, _ in pairs)
        if len(keys) < len(pairs):
            key, count = keys.most_common(1)[0]
            places = " and ".join(str(place) for place, (name, _) in enumerate(pairs, 1) if name == key)
            raise DataError(f"{option} {path}: {key!r} occurs {count} times in an object, as entries {places}")
        return dict(pairs)

    try:
        return json.loads(read_text(path, option), object_pairs_hook=unique if unique_keys else None)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{option} {path}: not JSON: {error}") from error


def existing_folder(path: Path, option: str) -> Path:
    """Returns `path`. Raises DataError if it is not a folder."""
    if not path.is_dir():
        raise DataError(f"{option} {path}: no such folder")
    return path


def read_rows(path: Path, option: str, columns: dict[str, str] | None = None) -> list[Row]:
    """The rows of a table, in the format of its suffix (TABLE_SUFFIXES).

    Args:
        columns: columns that every row must have -> the option that names them, for messages.

    Raises DataError if the file is missing, malformed, or lacks a column.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(
            f"{option} {path}: the name must end in {', '.join(TABLE_SUFFIXES[:-1])} or {TABLE_SUFFIXES[-1]}"
        )
    if suffix == ".parquet":
        rows = list(_parquet_rows(path, option))
    elif suffix == ".jsonl":
        rows = list(jsonl_rows(path, option))
    else:
        rows = list(csv_rows(path, option, "\t" if suffix == ".tsv" else ","))
    require_columns(rows, path, columns or {})
    return rows


def require_columns(rows: list[Row], path: Path, columns: dict[str, str]) -> None:
    """Raises DataError if a row lacks one of `columns`, as in `read_rows`."""
    for line, row in rows:
        for column, named_by in columns.items():
            if column not in row:
                found = ", ".join(row) or "no columns"
                raise DataError(f"{path}, line {line}: no {column!r} among {found}: name it with {named_by}")


def csv_rows(path: Path, option: str, delimiter: str = ",") -> Iterator[Row]:
    """Rows of a table with a header. Missing cells are None. Raises DataError."""
    reader = csv.DictReader(
        io.StringIO(read_text(path, option), newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    try:
        header = reader.fieldnames
        if not header:
            raise DataError(f"{option} {path}: empty; its first line must name the columns")
        reader.fieldnames = [name.strip() for name in header]
        for row in reader:
            if None in row:
                raise DataError(
                    f"{option} {path}, line {reader.line_num}: more cells than columns; a text that contains the "
                    "delimiter needs quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{option} {path}, line {reader.reader.line_num}: {error}") from error


def jsonl_rows(path: Path, option: str) -> Iterator[Row]:
    """The object of every line that is not blank. Raises DataError."""
    for line, text in enumerate(read_text(path, option).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{option} {path}, line {line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{option} {path}, line {line}: an object is expected, not {text[:40]!r}")
        yield line, row


def _parquet_rows(path: Path, option: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{option} {path}: reading Parquet needs pyarrow: pip install 'dsmoe-vl[parquet]'") from error
    try:
        table = parquet.ParquetFile(require_regular(path))
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except OSError as error:
        raise DataError(f"{option} {path}: {error.strerror or error}") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{option} {path}: not Parquet: {error}") from error
