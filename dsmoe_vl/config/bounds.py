"""The default and the allowed values of a recipe setting, written where the field is declared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_BOUNDS = "bounds"


def bounded(
    default: T,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> T:
    """A dataclass field with bounds: `least` and `most` inclusive, `above` exclusive; `choices`: allowed strings."""
    bounds = {"least": least, "most": most, "above": above, "choices": choices}
    return field(default=default, metadata={_BOUNDS: bounds})  # type: ignore[return-value]


def out_of_bounds(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted key, value and rule of every setting out of bounds, also in nested dataclasses, and in tuples and
    dicts of them."""
    for item in fields(settings):
        key, value = f"{prefix}{item.name}", getattr(settings, item.name)
        if is_dataclass(value):
            yield from out_of_bounds(value, f"{key}.")
        elif isinstance(value, dict):
            for name, one in value.items():
                yield from out_of_bounds(one, f"{key}.{shown_key(name)}.") if is_dataclass(one) else ()
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            for number, one in enumerate(value):
                yield from out_of_bounds(one, f"{key}[{number}].")
        elif rule := _broken_rule(value, item.metadata.get(_BOUNDS, {})):
            yield key, value, rule


def shown_key(name: str) -> str:
    """A key as TOML writes it: in quotes if it is no plain word."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'


def _broken_rule(value: Any, bounds: dict[str, Any]) -> str:
    if value is None:  # not set
        return ""
    least, most, above = (bounds.get(name) for name in ("least", "most", "above"))
    if least is not None and value < least:
        return "must not be negative" if least == 0 else f"must be at least {least}"
    if above is not None and value <= above:
        return f"must be above {above}"
    if most is not None and value > most:
        return f"must be at most {most}"
    if bounds.get("choices") and value not in bounds["choices"]:
        return f"must be one of {', '.join(filter(None, bounds['choices']))}"  # "" is: not set
    return ""
