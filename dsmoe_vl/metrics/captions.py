"""Caption metrics: BLEU 1 to 4, ROUGE-L and CIDEr-D, with the same values as coco-caption (Chen et al. 2015).

Captions are tokenized by `ptb_tokenizer`, or by choice into characters, and are lists of words here. As in
coco-caption, which joins the words into one string, an empty caption is one empty word for ROUGE-L and no word for the
others, and a no-break space splits a word for all but ROUGE-L. Values are 0 to 1; CIDEr-D is 0 to 10 (times 10, as
there). Papers often print 100 times these values.

Shapes: N captions, one per image, and at least one reference per image.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from dsmoe_vl.metrics.characters import split_characters
from dsmoe_vl.metrics.ptb_tokenizer import tokenize

Words = Sequence[str]
Ngrams = Counter[tuple[str, ...]]

# What counts as a word: those of English, or characters where a language is written without spaces.
SPLITS: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {"words": tokenize, "characters": split_characters}

LONGEST = 4  # n-grams of 1 to 4 words
# As in coco-caption, against division by zero: without any n-gram the precision is 1e-6, not 0 / 0.
_TINY, _SMALL = 1e-15, 1e-9


def caption_metrics(
    generated: Sequence[str], references: Sequence[Sequence[str]], split: str = "words"
) -> dict[str, float]:
    """`bleu1` to `bleu4` and `rouge_l`, 0 to 1, and `cider_d`, 0 to 10, of N generated captions of N images.

    BLEU is over the whole corpus, the others are means over captions. CIDEr-D takes n-gram frequencies from these N
    images: values of different sets are not comparable, and for a single image it is 0. Time and memory are linear in
    the number of words. split: a key of `SPLITS`.

    Raises ValueError if there are no captions, a different number of references, or an image without references.
    """
    sentences, truths = tokenized(generated, references, split)
    scores = {f"bleu{n}": value for n, value in enumerate(bleu(sentences, truths), 1)}
    scores["rouge_l"] = sum(rouge_l(sentences, truths)) / len(sentences)
    scores["cider_d"] = sum(cider_d(sentences, truths)) / len(sentences)
    return scores


def tokenized(
    generated: Sequence[str], references: Sequence[Sequence[str]], split: str = "words"
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """The words of N captions and of their references, as the single metrics take them.

    Raises ValueError as `caption_metrics` does.
    """
    if isinstance(references, str) or any(isinstance(own, str) for own in references):
        raise ValueError("references must be a list of captions for each image, not one text")
    if not generated or len(generated) != len(references):
        raise ValueError(f"{len(generated)} generated captions, but references of {len(references)} images")
    for image, own in enumerate(references):
        if not own:
            raise ValueError(f"image {image} of {len(references)} has no reference")
    words_of = SPLITS[split]
    sentences = iter(words_of([text for own in references for text in own]))
    return words_of(generated), [[next(sentences) for _ in own] for own in references]


def bleu(generated: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002, section 2.3): four fractions.

    `BP * (p_1 * ... * p_n) ** (1 / n)`. p_n is the fraction of generated n-grams that match, with counts clipped to the
    largest count in one reference. `BP = min(1, exp(1 - r / c))`: c is the number of generated words, r is the sum over
    captions of the length of the reference closest in length (of two equally close, the shorter).
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
    """`bleu` from its sums: matching and generated n-grams, by n from 1; generated words (c), reference words (r)."""
    ratio = (words + _TINY) / (wanted + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, values = 1.0, []
    for n in range(LONGEST):
        product *= (right[n] + _TINY) / (made[n] + _SMALL)
        values.append(brevity * product ** (1 / (n + 1)))
    return values


def rouge_l(generated: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> list[float]:
    """ROUGE-L of each caption, 0 to 1 (Lin 2004, section 3): `(1 + beta^2) P R / (R + beta^2 P)`.

    P is the length of the longest common subsequence with a reference divided by the caption's length, R the same
    divided by the reference's length. As in coco-caption, P and R are maxima over references, maybe of different ones.
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
    g_c and g_s are the n-gram vectors of caption and reference, `count * log(N / images with a reference that has it)`.
    d is the difference of their lengths, and min is elementwise. As in coco-caption a length is the number of bigrams,
    and an n-gram that is in no reference counts as in one image.
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
    """The weighted n-grams of one sentence, by n, and the norms of these vectors."""

    def __init__(self, words: Words, frequency: Ngrams, images: int) -> None:
        grams, length = _ngrams(words)
        self.pairs = max(length - 1, 0)
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in grams.items():
            self.weights[len(gram) - 1][gram] = count * (math.log(images) - math.log(max(frequency[gram], 1)))
        self.norms = [math.sqrt(sum(value * value for value in weights.values())) for weights in self.weights]

    def similarity(self, reference: _Weighted, sigma: float) -> float:
        """The mean over n of the clipped cosine, with the length penalty: 0 to 1."""
        total = 0.0
        for own, others, norm, other in zip(self.weights, reference.weights, self.norms, reference.norms, strict=True):
            if norm and other:
                product = sum(min(value, others[gram]) * others[gram] for gram, value in own.items() if gram in others)
                total += product / (norm * other)
        return total / LONGEST * math.exp(-((self.pairs - reference.pairs) ** 2) / (2 * sigma**2))


def _ngrams(words: Words) -> tuple[Ngrams, int]:
    """Counts of all n-grams of 1 to 4 words, and the number of words."""
    split = " ".join(words).split()
    grams: Ngrams = Counter()
    for n in range(1, LONGEST + 1):
        grams.update(zip(*(split[start:] for start in range(n)), strict=False))
    return grams, len(split)


def _common_length(first: Words, second: Words) -> int:
    """The length of the longest common subsequence, bit-parallel (Hyyro 2004): one row of the table is one integer.

    A zero at bit i of the row means that the subsequence grows with word i of `first`.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    row = everywhere = (1 << len(first)) - 1
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everywhere
    return len(first) - row.bit_count()
