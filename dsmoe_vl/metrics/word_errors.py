"""The word error rate of transcripts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsmoe_vl.metrics.captions import SPLITS


def transcript_metrics(generated: Sequence[str], references: Sequence[str], split: str = "words") -> dict[str, float]:
    """`word_error_rate`: insertions, deletions and substitutions over the words of all references, 0 for the best, may
    be above 1; and `exact`: the share of transcripts without an error.

    Words are those of the caption metrics: lower case, without punctuation. split: a key of `SPLITS`. Raises ValueError
    if there are no transcripts, a different number of references, or no word in any reference.
    """
    if not generated or len(generated) != len(references):
        raise ValueError(f"{len(generated)} transcripts, but {len(references)} references")
    words_of = SPLITS[split]
    pairs = list(zip(words_of(generated), words_of(references), strict=True))
    spoken = sum(len(wanted) for _, wanted in pairs)
    if not spoken:
        raise ValueError("no reference has a word")
    errors = [edits(said, wanted) for said, wanted in pairs]
    return {"word_error_rate": sum(errors) / spoken, "exact": errors.count(0) / len(errors)}


def edits(said: Sequence[str], wanted: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions that make one of the other (Levenshtein 1966)."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys((*said, *wanted)))}
    row = np.arange(len(wanted) + 1)
    target = np.array([numbers[word] for word in wanted], np.int64)
    steps = np.arange(len(wanted) + 1)
    for place, word in enumerate(said, 1):
        kept = np.minimum(row[1:] + 1, row[:-1] + (target != numbers[word]))
        # A word may also be inserted after the best that is left of it: the least of `kept` minus its place.
        row = np.minimum.accumulate(np.concatenate(([place], kept)) - steps) + steps
    return int(row[-1])
