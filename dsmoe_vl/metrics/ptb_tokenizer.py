"""Splits captions into words as coco-caption does: Penn Treebank tokens, in lower case, without punctuation.

The reference runs a Java program over all captions at once, one per line, and so does this file: if a caption ends in a
letter and a full stop, the next caption decides whether these are one token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dsmoe_vl.metrics.ptb_grammar import SPECIAL, Rule, rules

# Tokens that coco-caption removes. It looks for "-LRB-", but brackets are "-lrb-" by then, and stay.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The words of every caption. A line break inside a caption counts as a space.

    A word may contain no-break spaces, as "1 1/2" does. coco-caption's BLEU and CIDEr split there, its ROUGE does not.
    """
    lines: list[list[str]] = [[]]
    kept = False
    for token in _tokens("\n".join(_LINE_BREAK.sub(" ", caption) for caption in captions) + "\n"):
        if token == "\n":
            if kept:  # an address may end in a no-break space, but a line may not
                lines[-1][-1] = lines[-1][-1].rstrip()
            lines.append([])
        elif token not in PUNCTUATION:
            lines[-1].append(token)
        kept = token not in PUNCTUATION and token != "\n"
    return lines[: len(captions)]


_LINE_BREAK = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]")
# Most tokens need no rule: letters before a space or a stop, or the stop itself.
_SIMPLE = re.compile(r"[A-Za-z]{2,}(?=,?[ \n]|\.(?:\n| [A-Za-z]))|[,.](?=\n| [A-Za-z])")


def _tokens(text: str) -> Iterator[str]:
    """All tokens of a text that ends in a line break. What matches no rule is skipped."""
    grammar = rules()
    position = 0
    while position < len(text):
        if text[position] == "\n":
            yield "\n"
            position += 1
        elif text[position] == " " and text[position + 1].isascii():
            position += 1
        elif (simple := _SIMPLE.match(text, position)) and (token := simple[0].lower()) not in SPECIAL:
            yield token
            position = simple.end()
        elif found := _longest(grammar, text, position):
            rule, end = found
            if token := rule.emit(text[position:end]).lower():
                yield token
            position = end
        else:
            position += 1


def _longest(grammar: tuple[Rule, ...], text: str, position: int) -> tuple[Rule, int] | None:
    """The rule with the longest match at `position`, the first among equals, and the end of its token."""
    best, seen = None, position
    for rule in grammar:
        match = rule.pattern.match(text, position)
        if match and match.end() > seen:
            best, seen = (rule, match.end(1)), match.end()
    return best
