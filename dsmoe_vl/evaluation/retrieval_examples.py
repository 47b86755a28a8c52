"""Retrieval queries and their results, for the report.

Shapes: n media and m texts of the gallery, W embedding width, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.examples import example_priority, thumbnails
from dsmoe_vl.metrics.retrieval import rank_of
from dsmoe_vl.report.content import Candidate, RetrievalExample, Thumbnail
from dsmoe_vl.tasks.retrieval import pair_id

TOP = 5  # candidates shown per query


@dataclass(frozen=True)
class Gallery:
    """The searched embeddings: media [n, W] and text [m, W], unit vectors. media_of_text [m]: rows of media.

    `pairs` [n]: the `pair_id` of each medium; `texts` [m].
    """

    media: np.ndarray
    text: np.ndarray
    media_of_text: np.ndarray
    pairs: list[int]
    texts: list[str]


def retrieval_examples(
    gallery: Gallery, samples: Iterable[Sample], queries: int, seed: int = 0
) -> list[RetrievalExample]:
    """Examples for `queries` media, chosen by pair id, in both directions: the medium as a query for texts, and its
    first text as a query for media. `samples` must include the gallery's; one that is not found has no picture."""
    if not len(gallery.media):
        return []
    by_priority = sorted(range(len(gallery.media)), key=lambda row: example_priority(seed, str(gallery.pairs[row])))
    chosen = by_priority[:queries]
    first_text = {int(row): i for i, row in reversed(list(enumerate(gallery.media_of_text)))}
    to_media = {row: gallery.media @ gallery.text[first_text[row]] for row in chosen}
    wanted = {row for scores in to_media.values() for row in _best(scores)} | set(chosen)
    pictures = _pictures(samples, {gallery.pairs[row] for row in wanted})

    def medium(row: int, score: float, right: bool) -> Candidate:
        return Candidate(score, right, picture=pictures.get(gallery.pairs[row]))

    examples = []
    for row, scores in to_media.items():
        text = gallery.texts[first_text[row]]
        examples.append(_example("text_to_media", text, None, scores, np.arange(len(scores)) == row, medium))
    for row in chosen:
        scores = gallery.text @ gallery.media[row]
        examples.append(
            _example(
                "media_to_text", "", pictures.get(gallery.pairs[row]), scores, gallery.media_of_text == row,
                lambda i, score, right: Candidate(score, right, gallery.texts[i]),
            )
        )  # fmt: skip
    return examples


def _example(
    direction: Literal["text_to_media", "media_to_text"],
    text: str,
    picture: Thumbnail | None,
    scores: np.ndarray,
    right: np.ndarray,
    candidate: Callable[[int, float, bool], Candidate],
) -> RetrievalExample:
    """scores float [c] and right bool [c]: of all candidates."""
    best = int(np.flatnonzero(right)[scores[right].argmax()])
    place = rank_of(scores, right)
    found = [candidate(i, float(scores[i]), bool(right[i])) for i in _best(scores)]
    return RetrievalExample(
        direction, text, picture, found, candidate(best, float(scores[best]), True), place, len(scores)
    )


def _best(scores: np.ndarray) -> list[int]:
    return np.argsort(-scores, kind="stable")[:TOP].tolist()


def _pictures(samples: Iterable[Sample], pairs: set[int]) -> dict[int, Thumbnail]:
    """The first readable picture with a caption of each pair, as in the gallery; of a video, the middle frame."""
    found: dict[int, Thumbnail] = {}
    for sample in samples:
        if len(found) == len(pairs):
            break
        pair = pair_id(sample)
        if pair in found or pair not in pairs or not contents_of(sample).captions:
            continue
        try:
            found[pair] = thumbnails(sample, 1)[0]
        except DataError:
            continue
    return found
