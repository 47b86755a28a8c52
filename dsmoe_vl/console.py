"""Text from data on a terminal, which would obey the escape sequences in captions, names and answers of servers."""

from __future__ import annotations

import re
from typing import TextIO

# Control characters (C0, DEL, C1), characters that turn the direction of what follows, line separators, and lone
# surrogates, which cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""`text` with escapes such as \x1b in place of all control characters except those in `keep`."""

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        return f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"

    return _UNPRINTABLE.sub(escaped, text)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print lines that may have names of files or other text from data; `stream`: standard output by default."""
    print(printable(text, keep="\n\t"), file=stream, flush=True)


def one_line(text: str) -> str:
    """Prose in one printable line: tabs and line breaks, which a model may generate, become single blanks."""
    return printable(" ".join(text.split()))
