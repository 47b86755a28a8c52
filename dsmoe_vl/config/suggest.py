"""Suggests a valid name for a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`Did you mean "x"?` with the most similar of `valid`; the whole list if none is similar."""
    names = sorted(valid)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    return f'Did you mean "{near[0]}"?' if near else f"Valid here: {', '.join(names)}."
