"""The vectors from which rows of the token embedding start: `model.embedding_from = "vectors.bin"`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.data.word_vectors import read_vectors
from dsmoe_vl.errors import ConfigError, DataError


@dataclass(frozen=True)
class WordStart:
    """`vectors`, float32 [n, width], of the pieces in `rows`, in ascending order; `pieces` of the vocabulary begin a
    word, and the file has `words`."""

    rows: tuple[int, ...]
    vectors: np.ndarray
    pieces: int
    words: int

    @property
    def width(self) -> int:
        """Of the vectors."""
        return int(self.vectors.shape[1])

    @property
    def sha256(self) -> str:
        """Hex digits of what the embedding starts from, so that hosts can compare theirs."""
        return hashlib.sha256(repr(self.rows).encode() + self.vectors.tobytes()).hexdigest()


def read_word_start(recipe: Recipe, tokenizer: Tokenizer) -> WordStart | None:
    """None without `model.embedding_from`. Raises ConfigError if the file cannot be used for the model."""
    model, path = recipe.model, recipe.model.embedding_from
    if not path:
        return None
    setting = f"model.embedding_from = {path!r}"
    words = tokenizer.words()
    try:
        found = read_vectors(Path(path), words.keys())
    except DataError as error:
        raise ConfigError(f"{setting}: {error}") from None
    if found.width > model.width:
        raise ConfigError(
            f"{setting}: its vectors have {found.width} values, more than model.width = {model.width}, and would lose "
            "some: reduce them to that width, as by their principal components, or widen the model"
        )
    rows = {words[word]: vector for word, vector in found.vectors.items()}
    if not any(vector.any() for vector in rows.values()):
        raise ConfigError(
            f"{setting}: none of its {found.words:,} words is one of the {len(words):,} pieces of {tokenizer.path} "
            "that begin a word, or their vectors are zero: name vectors of the same language and spelling, or leave it "
            "out"
        )
    order = sorted(rows)
    return WordStart(tuple(order), np.stack([rows[row] for row in order]), len(words), found.words)


def describe_word_start(recipe: Recipe, tokenizer: Tokenizer) -> str:
    """A line for the plan; "" without `model.embedding_from`. Raises ConfigError."""
    start = read_word_start(recipe, tokenizer)
    if start is None:
        return ""
    width = recipe.model.width
    through = "" if start.width == width else f", turned from {start.width} values into {width}"
    return (
        f"embedding starts from {recipe.model.embedding_from}: {len(start.rows):,} of {tokenizer.size:,} pieces are "
        f"among its {start.words:,} words{through}; {start.pieces:,} pieces begin a word"
    )
