"""Retrieval metrics: recall and median rank in both directions.

Shapes: n media (pictures or videos), m texts, W width of an embedding. The n x m scores are computed in chunks: 5,000
media with 25,000 texts of W = 512, as in COCO's test, need 0.3 GB in addition to the embeddings.
"""

from __future__ import annotations

import numpy as np

COCO_MEDIA = 5000  # of the test split (Karpathy and Fei-Fei 2015)
COCO_FOLDS = 5
RECALLS = (1, 5, 10)  # k of R@k
_CAPTIONS = 5  # per image in that protocol, though some images have six or seven

_CHUNK_MEDIA = 256
# Scores closer than this are ties: they are below the precision of float32 unit vectors, and a collapsed encoder must
# not score by rounding. Equal dot products may also differ in the last bit within one matrix product.
_TIE = 1e-6


def retrieval_metrics(media: np.ndarray, text: np.ndarray, media_of_text: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 (fractions) and median rank (from 1) both ways, by cosine (VSE++, Faghri et al. 2018).

    media [n, W] and text [m, W] are unit vectors, media_of_text [m] are rows of media. The rank of a medium is the
    rank of its best own text among the texts of other media; the rank of a text is the rank of its medium among all
    media. In a tie a wrong candidate ranks first, so constant embeddings and NaNs rank last. Medians are rounded down,
    as in VSE++.

    No other pair is correct: duplicate media or texts count as wrong for each other, so remove them first. Keys:
    `{media_to_text,text_to_media}_{r1,r5,r10,median_rank}`. Raises ValueError if media_of_text does not fit, or a
    medium has no text.
    """
    own_texts = np.bincount(media_of_text, minlength=len(media))
    if len(media) == 0 or len(own_texts) != len(media) or len(media_of_text) != len(text) or not own_texts.all():
        raise ValueError(
            f"media_of_text must give each of {len(text)} texts one of {len(media)} media, and every medium a text"
        )
    media_rank, text_rank = _ranks(media.astype(np.float64), text.astype(np.float64), media_of_text, own_texts)
    return _summary("media_to_text", media_rank) | _summary("text_to_media", text_rank)


def rank_of(scores: np.ndarray, right: np.ndarray) -> int:
    """The rank, from 1, of the best correct candidate of one query, with the tie rule of `retrieval_metrics`. scores
    float [c]; right bool [c], at least one of them true."""
    return 1 + int(np.count_nonzero(~right & ~(scores < scores[right].max() - _TIE)))


def coco_metrics(
    media: np.ndarray, text: np.ndarray, media_of_text: np.ndarray, media_in_all: int = COCO_MEDIA
) -> dict[str, float]:
    """The COCO test of VSE++ (Faghri et al. 2018): `retrieval_metrics` of the first 5,000 media as `coco_5k_...`, and
    as `coco_1k_...` the mean over five folds of 1,000 consecutive media with their texts. Only the first five texts of
    a medium are used. {} if there are fewer media.

    Arguments as in `retrieval_metrics`, in the order of the data set. `media_in_all` replaces 5,000; it must be a
    multiple of five.
    """
    if len(media) < media_in_all:
        return {}
    size = media_in_all // COCO_FOLDS
    folds = [_part(media, text, media_of_text, start, size) for start in range(0, media_in_all, size)]
    whole = _part(media, text, media_of_text, 0, media_in_all)
    found = {f"coco_5k_{name}": value for name, value in whole.items()}
    return found | {f"coco_1k_{name}": float(np.mean([fold[name] for fold in folds])) for name in whole}


def _part(media: np.ndarray, text: np.ndarray, media_of_text: np.ndarray, start: int, size: int) -> dict[str, float]:
    """The metrics of `size` media and of the first texts of each."""
    order = np.argsort(media_of_text, kind="stable")
    sorted_media = media_of_text[order]
    place = np.arange(len(order)) - np.searchsorted(sorted_media, sorted_media)  # among the texts of its medium
    rows = np.sort(order[(place < _CAPTIONS) & (sorted_media >= start) & (sorted_media < start + size)])
    return retrieval_metrics(media[start : start + size], text[rows], media_of_text[rows] - start)


def _ranks(
    media: np.ndarray, text: np.ndarray, media_of_text: np.ndarray, own_texts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1 of media [n] and of texts [m]. Memory: a few arrays [_CHUNK_MEDIA, m]."""
    right = np.einsum("mw,mw->m", media[media_of_text], text)
    best = np.full(len(media), -np.inf)
    np.maximum.at(best, media_of_text, right)
    # A rank is one plus the wrong candidates that do not score clearly lower; with NaN, none does.
    media_rank = 1 + len(text) - own_texts
    text_rank = np.full(len(text), len(media))
    for start in range(0, len(media), _CHUNK_MEDIA):
        chunk = slice(start, start + _CHUNK_MEDIA)
        scores = media[chunk] @ text.T
        (texts,) = np.nonzero((media_of_text >= start) & (media_of_text < start + _CHUNK_MEDIA))
        scores[media_of_text[texts] - start, texts] = np.inf  # correct pairs are no wrong candidates
        media_rank[chunk] -= np.count_nonzero(scores < best[chunk, None] - _TIE, axis=1)
        text_rank -= np.count_nonzero(scores < right - _TIE, axis=0)
    return media_rank, text_rank


def _summary(direction: str, ranks: np.ndarray) -> dict[str, float]:
    recalls = {f"{direction}_r{k}": float(np.mean(ranks <= k)) for k in RECALLS}
    return recalls | {f"{direction}_median_rank": float(np.floor(np.median(ranks)))}
