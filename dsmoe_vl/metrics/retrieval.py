"""Does the embedding find the right partner? Recall and median rank in both directions.

Shapes: n media (pictures or videos), m texts, W width of an embedding. Of the n x m scores a part exists at a time:
5,000 media with 25,000 texts of W = 512, as in COCO's test, take 0.3 GB beside the embeddings themselves.
"""

from __future__ import annotations

import numpy as np

COCO_MEDIA = 5000  # of the test split (Karpathy and Fei-Fei 2015)
COCO_FOLDS = 5
RECALLS = (1, 5, 10)  # k of R@k
_CAPTIONS = 5  # an image in that protocol, though some have six or seven

_CHUNK_MEDIA = 256
# Scores closer than this are ties: float32 unit vectors cannot tell them apart, and a collapsed encoder must not score
# by rounding. Equal products may also differ in the last bit between places of one matrix product.
_TIE = 1e-6


def retrieval_metrics(media: np.ndarray, text: np.ndarray, media_of_text: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 (fractions) and median rank (from 1) both ways, by cosine (VSE++, Faghri et al. 2018).

    media [n, W] and text [m, W] are unit vectors, media_of_text [m] are rows of media. A medium has the rank of the
    best of its own texts among the texts of others, a text that of its medium among all media. A wrong candidate
    with an equal score ranks first, so constant embeddings are last everywhere, and so are NaNs. Medians are rounded
    down, as in VSE++.

    Nothing else is right: media or texts that occur twice count as each other's mistakes, so remove duplicates first.
    Keys: `{media_to_text,text_to_media}_{r1,r5,r10,median_rank}`. ValueError where media_of_text does not fit, or a
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
    """The rank, from 1, of the best right candidate of one query, by the tie rule of `retrieval_metrics`: a wrong
    candidate that it does not clearly beat ranks first. scores float [c]; right bool [c], at least one of them true."""
    return 1 + int(np.count_nonzero(~right & ~(scores < scores[right].max() - _TIE)))


def coco_metrics(
    media: np.ndarray, text: np.ndarray, media_of_text: np.ndarray, media_in_all: int = COCO_MEDIA
) -> dict[str, float]:
    """The COCO test of VSE++ (Faghri et al. 2018): `retrieval_metrics` of the first 5,000 media as `coco_5k_...`, and
    the mean of those of five folds of 1,000 consecutive media each, whose texts compete within the fold, as
    `coco_1k_...`. Of each medium the first five texts count. {} where there are fewer media.

    Arguments as in `retrieval_metrics`, in the order of the data set. `media_in_all`: another number than 5,000, a
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
    """Ranks from 1 of media [n] and of texts [m]. Memory is that of a few arrays [_CHUNK_MEDIA, m]."""
    right = np.einsum("mw,mw->m", media[media_of_text], text)
    best = np.full(len(media), -np.inf)
    np.maximum.at(best, media_of_text, right)
    # A rank is one plus the wrong candidates that were not clearly beaten: a comparison with a NaN beats nobody.
    media_rank = 1 + len(text) - own_texts
    text_rank = np.full(len(text), len(media))
    for start in range(0, len(media), _CHUNK_MEDIA):
        chunk = slice(start, start + _CHUNK_MEDIA)
        scores = media[chunk] @ text.T
        (texts,) = np.nonzero((media_of_text >= start) & (media_of_text < start + _CHUNK_MEDIA))
        scores[media_of_text[texts] - start, texts] = np.inf  # right pairs are no candidates
        media_rank[chunk] -= np.count_nonzero(scores < best[chunk, None] - _TIE, axis=1)
        text_rank -= np.count_nonzero(scores < right - _TIE, axis=0)
    return media_rank, text_rank


def _summary(direction: str, ranks: np.ndarray) -> dict[str, float]:
    recalls = {f"{direction}_r{k}": float(np.mean(ranks <= k)) for k in RECALLS}
    return recalls | {f"{direction}_median_rank": float(np.floor(np.median(ranks)))}
