"""How well a trained model finds the text of a picture or video, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dsmoe_vl.data.segment import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.retrieval_metrics import retrieval_metrics
from dsmoe_vl.inference.embed import embed_media, embed_texts
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.tasks.caption import captions_of
from dsmoe_vl.tasks.retrieval import pair_id

_BATCH_SAMPLES = 32


def evaluate_retrieval(trained: TrainedModel, samples: Iterable[Sample], gallery: int) -> dict[str, float]:
    """`retrieval_metrics` over the first `gallery` samples that can be read and show different things, with all their
    captions; plus `samples`. Several samples of one content would be each other's mistakes. {} where there are none.
    """
    seen: set[int] = set()
    media: list[np.ndarray] = []
    texts: list[str] = []
    media_of_text: list[int] = []
    for sample in samples:
        captions = [text for text in captions_of(sample) if text.strip()]
        if len(seen) == gallery:
            break
        if pair_id(sample) in seen or not captions:
            continue
        try:
            media.append(embed_media(trained, [sample]))
        except DataError:
            continue
        seen.add(pair_id(sample))
        media_of_text += [len(media) - 1] * len(captions)
        texts += captions
    if not media:
        return {}
    batches = [texts[i : i + _BATCH_SAMPLES] for i in range(0, len(texts), _BATCH_SAMPLES)]
    text = np.concatenate([embed_texts(trained, batch) for batch in batches])
    return {"samples": len(media), **retrieval_metrics(np.concatenate(media), text, np.array(media_of_text))}
