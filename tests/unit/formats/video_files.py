"""Annotation files of video datasets, and what became of their records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_tools.formats import Record


def write(path: Path, content: Any) -> Path:
    """A text file of `content`, as JSON where it is no text."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def by_id(records: list[Record]) -> dict[str, Record]:
    """The records by identifier, each of which must occur once."""
    found = {record.identifier: record for record in records}
    assert len(found) == len(records)
    return found


def problems(records: list[Record]) -> dict[str, str]:
    """The problem of each record that has one, by identifier."""
    return {record.identifier: record.problem for record in records if record.problem}
