"""Files of word2vec, in both forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsmoe_vl.data.word_vectors import writing_vectors


def write_vectors(path: Path, words: Sequence[str], vectors: np.ndarray) -> Path:
    """The binary form; vectors float32 [n, width]."""
    with writing_vectors(path, vectors.shape[1]) as write:
        for word, vector in zip(words, vectors, strict=True):
            write(word, vector)
    return path


def write_text(path: Path, words: Sequence[str], vectors: np.ndarray) -> Path:
    """The text form."""
    lines = [f"{len(words)} {vectors.shape[1]}"]
    lines += [" ".join([word, *map(repr, row.tolist())]) for word, row in zip(words, vectors, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path
