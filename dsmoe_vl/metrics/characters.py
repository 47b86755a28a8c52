"""Splits captions of languages that are written without spaces: a character is a word, for the same metrics.

Chinese captions are scored so where no segmenter is agreed upon, as in the `zh` rule of sacreBLEU (Post 2018): words of
other scripts and numbers in between stay whole. Lower case, without punctuation, as `ptb_tokenizer` leaves words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

# The first words of the names that Unicode gives to characters of such scripts.
_WITHOUT_SPACES = frozenset(
    ("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "BOPOMOFO", "KANGXI", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
)


def split_characters(captions: Sequence[str]) -> list[list[str]]:
    """The characters and the words of every caption. A mark, such as a Thai vowel above, stays with its letter."""
    return [_split(unicodedata.normalize("NFKC", caption).lower()) for caption in captions]


def _split(caption: str) -> list[str]:
    tokens: list[str] = []
    is_open = False  # whether the last token is a word that the next letter belongs to
    for character in caption:
        kind = unicodedata.category(character)[0]
        if kind == "M" and tokens:
            tokens[-1] += character
        elif kind not in "LN":  # spaces, punctuation, symbols
            is_open = False
        elif _stands_alone(character):
            tokens.append(character)
            is_open = False
        elif is_open:
            tokens[-1] += character
        else:
            tokens.append(character)
            is_open = True
    return tokens


@lru_cache(maxsize=65536)
def _stands_alone(character: str) -> bool:
    return unicodedata.name(character, "").partition(" ")[0] in _WITHOUT_SPACES
