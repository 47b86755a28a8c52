"""Text from data, plans and paths on its way into HTML: everything that is not ours passes through here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

_LONGEST = 600  # characters of a caption or a summary
# Not allowed in HTML, or without a picture: the C0 and C1 control characters, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def said(text: str) -> str:
    """Text as HTML that shows it, in an element or a quoted attribute."""
    return escape(_UNPRINTABLE.sub("�", text), quote=True)


def passage(text: str) -> str:
    """As `said`, but not more than fits on a card; an empty text says so."""
    text = " ".join(text.split())
    if not text:
        return '<span class="note">(empty)</span>'
    return said(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def short_name(folder: str, folders: Iterable[str]) -> str:
    """The last part of a folder or address; more of it where others end alike."""
    parts = folder.rstrip("/").split("/")
    others = [other.rstrip("/").split("/") for other in folders if other != folder]
    for count in range(1, len(parts)):
        if all(other[-count:] != parts[-count:] for other in others) and parts[-count]:
            return "/".join(parts[-count:])
    return folder


def magnitude(number: float) -> str:
    """Three digits and what they count in: 5,144,915 is "5.14 million"."""
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
