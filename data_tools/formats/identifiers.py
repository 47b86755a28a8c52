"""Identifiers in annotations, compared as the text that they have in the shards."""

from __future__ import annotations

import math
from typing import Any

from dsmoe_vl.errors import DataError


def identifier_text(value: Any) -> str | None:
    """The text of an identifier; None if `value` cannot be one (null, true, NaN, an empty text, a list, an object).

    A text stays what it is: "01" and "1.0" are not "1". A whole number has no point and no leading zeros: 1 and 1.0,
    which tables make of 1 if a cell of the column is empty, are both "1".
    """
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    try:
        return str(value)
    except ValueError:  # thousands of digits
        return None


def identifier(value: Any, place: str) -> str:
    """As `identifier_text`. Raises DataError, with the place, if `value` cannot be an identifier."""
    text = identifier_text(value)
    if text is None:
        raise DataError(f"{place}: {value!r:.60} is not an identifier: give a text or a number")
    return text


class Unique:
    """Identifiers that may occur once."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def add(self, identifier: str, place: str) -> str:
        """Returns `identifier`. Raises DataError, with both places, if it was added before."""
        first = self._places.setdefault(identifier, place)
        if first is not place:
            raise DataError(f"{first} and {place} have the identifier {identifier!r}: identifiers must be unique")
        return identifier
