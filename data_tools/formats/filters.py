"""`--filter "punsafe<=0.5"`: selects rows of a dataset by the values of their columns."""

from __future__ import annotations

import argparse
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmoe_vl.errors import DataError

_CONDITION = re.compile(r"\s*([^<>=!]*[^<>=!\s])\s*(<=|>=|==|!=|<|>)\s*(.*\S)\s*")
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Condition:
    """`column` `comparison` `value`, such as punsafe <= 0.5."""

    column: str
    comparison: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read "punsafe<=0.5". Raises DataError."""
        found = _CONDITION.fullmatch(text)
        if not found:
            raise DataError(
                f"--filter {text!r}: write COLUMN, one of {' '.join(_COMPARISONS)}, and VALUE: 'punsafe<=0.5'"
            )
        condition = cls(*found.groups())
        if condition.comparison not in ("==", "!=") and _number(condition.value) is None:
            raise DataError(f"--filter {text!r}: {condition.comparison} compares numbers; write == or != for a text")
        return condition

    def is_met(self, row: Mapping[str, Any]) -> bool:
        """Whether a row meets the condition. A row without a value in the column does not.

        If both values are numbers, also in a text cell, they are compared as numbers, else as texts.
        """
        found = row.get(self.column)
        if found is None or found == "" or found != found:  # NaN: a missing number
            return False
        number, wanted = _number(found), _number(self.value)
        if number is not None and wanted is not None:
            return _COMPARISONS[self.comparison](number, wanted)
        text, value = str(found).strip(), self.value
        if isinstance(found, bool):  # JSON's true, Python's True
            text, value = text.lower(), value.lower()
        return self.comparison in ("==", "!=") and _COMPARISONS[self.comparison](text, value)


class Filters:
    """All conditions of a command line. Rows must meet each of them."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises DataError for a malformed condition."""
        self.conditions = [Condition.parse(text) for text in texts]
        self._columns: dict[str, None] = {}  # of all rows, in the order of first occurrence
        self._rows = self._accepted = 0

    def accept(self, row: Mapping[str, Any]) -> bool:
        """Whether a row meets all conditions."""
        if not self.conditions:
            return True
        self._columns.update(dict.fromkeys(row))
        accepted = all(condition.is_met(row) for condition in self.conditions)
        self._rows += 1
        self._accepted += accepted
        return accepted

    def check(self, place: str) -> None:
        """Check, after all rows of `place`, that the filters made sense.

        Raises DataError if no row had one of the columns, which is probably misspelt, or if no row was accepted.
        """
        if self._rows == 0:
            return
        for condition in self.conditions:
            if condition.column not in self._columns:
                known = ", ".join(self._columns) or "none"
                raise DataError(f"--filter: nothing in {place} has {condition.column!r}; columns there: {known}")
        if self._accepted == 0:
            asked = " and ".join(f"{one.column}{one.comparison}{one.value}" for one in self.conditions)
            raise DataError(f"--filter: none of the {self._rows} rows of {place} has {asked}")


def add_filter_argument(parser: argparse.ArgumentParser, columns: str) -> None:
    """Add `--filter`, repeatable. `columns`: what its columns are, for the help."""
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="CONDITION",
        help=f"use only rows that meet it, such as 'punsafe<=0.5' ({' '.join(_COMPARISONS)}); of {columns}; repeatable",
    )


def _number(value: Any) -> float | None:
    """`value`, a number or its text, as a number; None if it is not one."""
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number
