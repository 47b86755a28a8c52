"""Captions against human ones: BLEU 1 to 4, ROUGE-L and CIDEr-D, equal to coco-caption's (Chen et al. 2015).

A caption is tokenized by `ptb_tokenizer`, and is a list of words here. coco-caption passes sentences on as one string,
which is why an empty caption is one empty word to ROUGE-L and no word to the others, and why a no-break space within a
word splits it for all but ROUGE-L. Fractions are 0 to 1, and CIDEr-D, times 10 as there, is 0 to 10. Papers often print
100 times either.

Shapes: N captions, one for each image, and each image's references, at least one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from dsmoe_vl.metrics.ptb_tokenizer import tokenize

Words = Sequence[str]
Ngrams = Counter[tuple[str, ...]]

LONGEST = 4  # n-grams of 1 to 4 words
# coco-caption's, against divisions by zero: no n-gram and none right gives 1e-6, not 0 / 0.
_TINY, _SMALL = 1e-15, 1e-9


def caption_metrics(generated: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu1` to `bleu4` and `rouge_l`, 0 to 1, and `cider_d`, 0 to 10, of N generated captions of N images.

    BLEU is of all captions as one text, the others are means over captions. CIDEr-D takes the frequency of n-grams from
    these N images: values of different sets do not compare, and of a single image it is 0. Time and memory are linear
    in the number of words.

    Raises ValueError for no captions, another number of references, and an image without any.
    """
    sentences, truths = tokenized(generated, references)
    scores = {f"bleu{n}": value for n, value in enumerate(bleu(sentences, truths), 1)}
    scores["rouge_l"] = sum(rouge_l(sentences, truths)) / len(sentences)
    scores["cider_d"] = sum(cider_d(sentences, truths)) / len(sentences)
    return scores


def tokenized(
    generated: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """The words of N captions and of their references, which the metrics of single captions are given.

    Raises ValueError as `caption_metrics` does.
    """
    if isinstance(references, str) or any(isinstance(own, str) for own in references):
        raise ValueError("references must be a list of captions for each image, not one text")
    if not generated or len(generated) != len(references):
        raise ValueError(f"{len(generated)} generated captions, but references of {len(references)} images")
    for image, own in enumerate(references):
        if not own:
            raise ValueError(f"image {image} of {len(references)} has no reference")
    sentences = iter(tokenize([text for own in references for text in own]))
    return tokenize(generated), [[next(sentences) for _ in own] for own in references]


def bleu(generated: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of all captions as one text (Papineni et al. 2002, section 2.3): four fractions.

    `BP * (p_1 * ... * p_n) ** (1 / n)`. p_n is the share of the generated n-grams that are right; an n-gram is right as
    often as it is in the one reference that has most of it. `BP = min(1, exp(1 - r / c))`, with c generated words, and
    r summed over captions: the length of the reference closest in length, the shorter of two equally close.
    """
    right, made = [0] * LONGEST, [0] * LONGEST
    words, wanted = 0, 0
    for sentence, own in zip(generated, references, strict=True):
        most: Ngrams = Counter()
        lengths = []
        for reference in own:
            grams, length = _ngrams(reference)
            most |= grams
            lengths.append(length)
        grams, length = _ngrams(sentence)
        for gram, count in grams.items():
            right[len(gram) - 1] += min(count, most[gram])
            made[len(gram) - 1] += count
        words += length
        wanted += min(lengths, key=lambda other: (abs(other - length), other))
    return bleu_of_counts(right, made, words, wanted)


def bleu_of_counts(right: Sequence[int], made: Sequence[int], words: int, wanted: int) -> list[float]:
    """`bleu` from its sums: n-grams right and generated, by n from 1, and the words generated (c) and wanted (r)."""
    ratio = (words + _TINY) / (wanted + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, values = 1.0, []
    for n in range(LONGEST):
        product *= (right[n] + _TINY) / (made[n] + _SMALL)
        values.append(brevity * product ** (1 / (n + 1)))
    return values


def rouge_l(generated: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> list[float]:
    """ROUGE-L of each caption, 0 to 1 (Lin 2004, section 3): `(1 + beta^2) P R / (R + beta^2 P)`.

    P is the longest common subsequence with a reference by the caption's length, R the same by the reference's length.
    coco-caption takes the largest P and the largest R, which may be of different references.
    """
    scores = []
    for sentence, own in zip(generated, references, strict=True):
        words = sentence or [""]
        common = [(_common_length(words, reference or [""]), len(reference) or 1) for reference in own]
        precision = max(length for length, _ in common) / len(words)
        recall = max(length / of for length, of in common)
        weight = beta**2
        scores.append((1 + weight) * precision * recall / (recall + weight * precision) if precision else 0.0)
    return scores


def cider_d(generated: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each caption, 0 to 10 (Vedantam et al. 2015).

    `10 * mean over references s and n of exp(-d^2 / (2 sigma^2)) * (min(g_c, g_s) . g_s) / (|g_c| |g_s|)`.
    g_c and g_s weigh each n-gram of caption and reference by `count * log(N / images with a reference that has it)`,
    d is the difference of their lengths, and min is taken for each n-gram. As in coco-caption a length is the number of
    pairs of words, and an n-gram of no reference counts as one of a single image.
    """
    frequency: Ngrams = Counter()
    for own in references:
        frequency.update({gram for reference in own for gram in _ngrams(reference)[0]})
    scores = []
    for sentence, own in zip(generated, references, strict=True):
        candidate = _Weighted(sentence, frequency, len(references))
        similar = sum(
            candidate.similarity(_Weighted(reference, frequency, len(references)), sigma) for reference in own
        )
        scores.append(10 * similar / len(own))
    return scores


class _Weighted:
    """The n-grams of one sentence with their weights, by n, and the lengths of these vectors."""

    def __init__(self, words: Words, frequency: Ngrams, images: int) -> None:
        grams, length = _ngrams(words)
        self.pairs = max(length - 1, 0)
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in grams.items():
            self.weights[len(gram) - 1][gram] = count * (math.log(images) - math.log(max(frequency[gram], 1)))
        self.norms = [math.sqrt(sum(value * value for value in weights.values())) for weights in self.weights]

    def similarity(self, reference: _Weighted, sigma: float) -> float:
        """The mean over n of the clipped cosine, less for another length: 0 to 1."""
        total = 0.0
        for own, others, norm, other in zip(self.weights, reference.weights, self.norms, reference.norms, strict=True):
            if norm and other:
                product = sum(min(value, others[gram]) * others[gram] for gram, value in own.items() if gram in others)
                total += product / (norm * other)
        return total / LONGEST * math.exp(-((self.pairs - reference.pairs) ** 2) / (2 * sigma**2))


def _ngrams(words: Words) -> tuple[Ngrams, int]:
    """How often each run of 1 to 4 words is there, and the number of words."""
    split = " ".join(words).split()
    grams: Ngrams = Counter()
    for n in range(1, LONGEST + 1):
        grams.update(zip(*(split[start:] for start in range(n)), strict=False))
    return grams, len(split)


def _common_length(first: Words, second: Words) -> int:
    """The length of the longest common subsequence, a row of the table at a time as one number (Hyyro 2004).

    A zero at bit i of the row says that the common part grows with word i of `first`.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    row = everywhere = (1 << len(first)) - 1
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everywhere
    return len(first) - row.bit_count()
