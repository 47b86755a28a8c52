"""Captions in a file of their own, by the number or the path of what they describe."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_tools.formats.identifiers import identifier_text
from data_tools.formats.tables import read_json, read_rows
from dsmoe_vl.errors import DataError

NAMES = ("index", "file")  # columns of a table, the first that has a value names the row
TEXT = "text"
_SHOWN = 3


class CaptionFile:
    """A table (csv, tsv, jsonl, parquet) with the column `text` and `index` or `file`, or a .json with an object of
    texts, or lists of them, by index or path. Raises DataError for anything else."""

    def __init__(self, path: Path, option: str) -> None:
        self.path = path
        self._captions: dict[str, list[Any]] = {}
        self._taken: set[str] = set()
        if path.suffix.lower() == ".json":
            self._read_object(option)
        else:
            self._read_table(option)

    def of(self, names: Iterable[str]) -> list[Any]:
        """The captions under all of these names of one thing."""
        found: list[Any] = []
        for name in names:
            if name in self._captions:
                self._taken.add(name)
                found += self._captions[name]
        return found

    def require_use(self, known: str) -> None:
        """Raises DataError if no name was asked for. `known`: one of the names that were asked for, for the message."""
        if self._captions and not self._taken:
            raise DataError(
                f"{self.path} names {', '.join(map(repr, self._first()))}, and the data has nothing of these names but "
                f"such as {known!r}: name the captions as the data does"
            )

    def unused(self) -> str:
        """How many names nobody asked for, with examples; "" without any."""
        if not (first := self._first()):
            return ""
        left = len(self._captions) - len(self._taken)
        dots = ", ..." if left > len(first) else ""
        return f"captions of {left} others in {self.path.name} ({', '.join(first)}{dots})"

    def _first(self) -> list[str]:
        left = (name for name in self._captions if name not in self._taken)
        return [name for name, _ in zip(left, range(_SHOWN), strict=False)]

    def _read_object(self, option: str) -> None:
        content = read_json(self.path, option, unique_keys=True)
        if not isinstance(content, dict):
            raise DataError(f"{option} {self.path}: an object with captions by index or path is expected")
        for name, value in content.items():
            texts = value if isinstance(value, list) else [value]
            if wrong := [one for one in texts if not isinstance(one, str)]:
                raise DataError(
                    f"{option} {self.path}, {name!r}: {wrong[0]!r:.60} is not a text: write an object of texts, or "
                    "lists of texts, by index or path; the annotations of COCO have a format of their own, `coco`"
                )
            self._captions.setdefault(posixpath.normpath(name), []).extend(texts)

    def _read_table(self, option: str) -> None:
        for line, row in read_rows(self.path, option, {TEXT: "this column"}):
            columns = [name for name in NAMES if name in row]
            if not columns:
                raise DataError(
                    f"{option} {self.path}, line {line}: neither 'index' nor 'file' among {', '.join(row)}: name the "
                    "column with the index or the path so"
                )
            name = next((text for column in columns if (text := identifier_text(row[column]))), "").strip()
            if not name:
                raise DataError(f"{option} {self.path}, line {line}: no value in {' and '.join(map(repr, columns))}")
            self._captions.setdefault(posixpath.normpath(name), []).append(row[TEXT])
