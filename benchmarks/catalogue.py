"""A catalogue that has to be known by heart: pictures of articles, and a text for each that nothing in it foretells.

An article's picture is a code of 4 x 4 coloured squares, its text six words drawn at random, once for all. Held-out
pictures show the same articles in other light and noise. So what is measured is how much a model of some size can
remember, which is what experts are said to add (Jelassi et al. 2024, "Mixture of Parrots").
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.tokenizer.train import train
from data_tools.writer import ShardWriter

ARTICLES = 1024
WORDS = 6  # of a text, each one of VOCABULARY
SIDE, SQUARES = 64, 4  # pixels and squares along a picture
TRAINING_VIEWS = 8  # pictures of an article

_COLOURS = np.array([(220, 50, 50), (50, 160, 70), (60, 90, 220), (240, 200, 60)])
_VOCABULARY = [a + b + c + "a" for a in "bdklmnrs" for b in "aiou" for c in "nr"]  # 64 words


def make(folder: Path) -> None:
    """Write the shard folders `train` and `eval` and `tokenizer.model`; nothing where they are. Always the same."""
    if (folder / "tokenizer.model").exists():
        return
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, len(_COLOURS), (ARTICLES + 64, SQUARES**2)), axis=0)[:ARTICLES]
    texts = [
        " ".join(_VOCABULARY[word] for word in row) for row in rng.integers(0, len(_VOCABULARY), (ARTICLES, WORDS))
    ]
    for split, views in (("train", TRAINING_VIEWS), ("eval", 1)):
        with ShardWriter(folder / split, split, 512) as writer:
            for key, article, picture in _pictures(codes, split, views):
                text = texts[article]
                meta = {"id": key, "source": "catalogue", "content": f"article {article}", "captions": [text]}
                writer.write(key, picture, "jpg", text, {**meta, "tasks": ["caption", "retrieval"]})
    train([folder / "train"], folder / "tokenizer.model", vocab_size=512)


def _pictures(codes: np.ndarray, split: str, views: int) -> Iterator[tuple[str, int, bytes]]:
    """Key, article and JPEG, in an order that mixes articles."""
    rng = np.random.default_rng([1, views])
    for number, article in enumerate(rng.permutation(np.repeat(np.arange(len(codes)), views))):
        squares = _COLOURS[codes[article]].reshape(SQUARES, SQUARES, 3)
        pixels = np.kron(squares, np.ones((SIDE // SQUARES, SIDE // SQUARES, 1)))
        seen = pixels * rng.uniform(0.75, 1.1) + rng.normal(0, 12, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(seen.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        yield f"{split}-{number:06d}", int(article), file.getvalue()
