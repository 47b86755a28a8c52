"""Captions of held-out samples. Do they name what is there, and do they read as human ones do?

The first is known of samples whose KEY.json lists `attributes`: objects with a colour and a shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dsmoe_vl.data.segment import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.inference.generate import caption
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.metrics.captions import caption_metrics

_BATCH_SAMPLES = 32


@dataclass(frozen=True)
class Captioned:
    """One held-out sample with its generated caption. `correct` is None where the truth is unknown."""

    sample: Sample
    generated: str
    correct: bool | None


def names_every_object(text: str, attributes: list[dict[str, str]]) -> bool:
    """Whether the text says "COLOUR SHAPE" of every object; two objects alike must be said twice."""
    words = " ".join(re.findall(r"[a-z]+", text.lower()))
    wanted = [f"{thing['colour']} {thing['shape']}" for thing in attributes]
    return all(len(re.findall(rf"\b{phrase}\b", words)) >= wanted.count(phrase) for phrase in set(wanted))


def text_scores(texts: Iterable[tuple[str, list[str]]]) -> dict[str, float]:
    """`caption_metrics` of generated texts, each with its references. {} where no text has one.

    Blank references, and texts that are left without any, are passed over.
    """
    known = [(text, own) for text, references in texts if (own := [one for one in references if one.strip()])]
    return caption_metrics([text for text, _ in known], [own for _, own in known]) if known else {}


def caption_samples(trained: TrainedModel, samples: Iterator[Sample], max_tokens: int) -> Iterator[Captioned]:
    """Captions for every sample, in order, some at a time; a sample that cannot be read is passed over."""
    waiting: list[Sample] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == _BATCH_SAMPLES:
            yield from _caption_batch(trained, waiting, max_tokens)
            waiting = []
    if waiting:
        yield from _caption_batch(trained, waiting, max_tokens)


def _caption_batch(trained: TrainedModel, samples: list[Sample], max_tokens: int) -> Iterator[Captioned]:
    try:
        texts = caption(trained, samples, max_tokens)
    except DataError:
        if len(samples) > 1:  # find the one that cannot be read
            for sample in samples:
                yield from _caption_batch(trained, [sample], max_tokens)
        return
    for sample, text in zip(samples, texts, strict=True):
        attributes = sample.meta.get("attributes")
        correct = names_every_object(text, attributes) if attributes else None
        yield Captioned(sample, text, correct)
