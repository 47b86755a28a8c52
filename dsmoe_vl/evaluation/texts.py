"""Scores of generated texts: do they name every object, and do they match the references?

The first needs `attributes` in KEY.json: objects with a colour and a shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.metrics.captions import caption_metrics
from dsmoe_vl.metrics.meteor_spice import java_metrics
from dsmoe_vl.report.content import ScoreLabel

# Display names of text scores, for all tasks.
TEXT_LABELS = {
    "attribute_accuracy": ScoreLabel("name every object's colour and shape, %", "percent"),
    "cider_d": ScoreLabel("CIDEr"),
    "rouge_l": ScoreLabel("ROUGE-L (0 to 1)"),
    "meteor": ScoreLabel("METEOR (0 to 1)"),
    "spice": ScoreLabel("SPICE (0 to 1)"),
    **{f"bleu{n}": ScoreLabel(f"BLEU-{n} (0 to 1)") for n in (1, 2, 3, 4)},
    "cider_d_characters": ScoreLabel("CIDEr of characters"),
    "rouge_l_characters": ScoreLabel("ROUGE-L of characters (0 to 1)"),
    **{f"bleu{n}_characters": ScoreLabel(f"BLEU-{n} of characters (0 to 1)") for n in (1, 2, 3, 4)},
}


def names_every_object(text: str, sample: Sample) -> bool | None:
    """Whether the text says "COLOUR SHAPE" for every object; two equal objects must be named twice.

    None if KEY.json has no `attributes`, or others than colours and shapes: datasets use the name for many things.
    """
    objects = sample.meta.get("attributes")
    try:
        wanted = [f"{thing['colour']} {thing['shape']}" for thing in objects] if isinstance(objects, list) else []
    except (KeyError, TypeError):
        return None
    if not wanted:
        return None
    words = " ".join(re.findall(r"[a-z]+", text.lower()))
    return all(len(re.findall(rf"\b{re.escape(phrase)}\b", words)) >= wanted.count(phrase) for phrase in set(wanted))


def text_scores(texts: Iterable[tuple[str, list[str]]], split: str = "words", java: str = "") -> dict[str, float]:
    """`caption_metrics` of generated texts, each with its references, and with `java` those of `java_metrics`. {} if no
    text has a reference. Names of scores include the split, unless it is words.

    Blank references and texts without references are skipped.
    """
    known = [(text, own) for text, references in texts if (own := [one for one in references if one.strip()])]
    if not known:
        return {}
    generated, references = [text for text, _ in known], [own for _, own in known]
    scores = caption_metrics(generated, references, split)
    named = scores if split == "words" else {f"{name}_{split}": value for name, value in scores.items()}
    return named | (java_metrics(generated, references, java) if java else {})
