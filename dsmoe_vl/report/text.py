"""Names, numbers and settings as short texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


def short_names(folders: Iterable[str]) -> dict[str, str]:
    """The last part of each folder or URL, or more parts if others end the same."""
    parts = {folder: folder.rstrip("/").split("/") for folder in folders}
    return {folder: _short_name(folder, parts) for folder in parts}


def magnitude(number: float) -> str:
    """A number with three digits and its unit: 5,144,915 is "5.14 million"."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,.0f}"


def flat(value: Any, name: str = "") -> Iterator[str]:
    """Nested settings as lines "name = value", the names of tables joined by dots."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from flat(inner, f"{name}[{number}]")
    else:
        yield f"{name} = {json.dumps(value, ensure_ascii=False, default=str)}"


def _short_name(folder: str, parts: dict[str, list[str]]) -> str:
    own = parts[folder]
    others = [of_other for other, of_other in parts.items() if other != folder]
    for count in range(1, len(own)):
        if own[-count] and all(of_other[-count:] != own[-count:] for of_other in others):
            return "/".join(own[-count:])
    return folder
