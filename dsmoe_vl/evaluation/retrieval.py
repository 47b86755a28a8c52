"""Scores the retrieval of a trained model: text by picture or video, the reverse, and by spoken queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.retrieval_examples import Gallery, retrieval_examples
from dsmoe_vl.evaluation.task_evaluation import Bad, Folder, Options, Scores, end
from dsmoe_vl.inference.embed import embed_media, embed_recordings, embed_texts
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.metrics.retrieval import COCO_MEDIA, RECALLS, coco_metrics, retrieval_metrics
from dsmoe_vl.report import TEMPLATES
from dsmoe_vl.report.content import RetrievalExample, ScoreLabel, Section
from dsmoe_vl.tasks.retrieval import pair_id

_BATCH_TEXTS = 32


def _labels() -> dict[str, ScoreLabel]:
    labels = {"samples": ScoreLabel("pictures or videos searched", "count")}
    for test, prefix in (("", ""), ("coco_5k_", "COCO 5k test, "), ("coco_1k_", "COCO 1k test, ")):
        for direction, name in (("media_to_text", "picture to text"), ("text_to_media", "text to picture")):
            for k in RECALLS:
                place = "right one found first" if k == 1 else f"right one among the first {k}"
                labels[f"{test}{direction}_r{k}"] = ScoreLabel(f"{prefix}{name}: {place} (R@{k}), %", "percent")
            median = ScoreLabel(f"{prefix}{name}: median place of the right one", "count")
            labels[f"{test}{direction}_median_rank"] = median
    spoken = {
        name.replace("text_", "speech_"): replace(label, text=label.text.replace("text to", "speech to"))
        for name, label in labels.items()
        if name.startswith("text_to_media")
    }
    return labels | {"spoken": ScoreLabel("spoken queries, each for one of their pictures", "count"), **spoken}


@dataclass(frozen=True)
class _Shown:
    """One picture or video of the gallery with its captions. `embedding`: float32 [1, W]; `spoken`: that of its
    recording, if it has one and the model hears."""

    pair: int
    embedding: np.ndarray
    captions: list[str]
    spoken: np.ndarray | None = None


class RetrievalEvaluation:
    """Retrieval in both directions, text to media and media to text."""

    labels = _labels()
    section = Section("retrieval", "What queries find, by cosine similarity", TEMPLATES / "retrieval.html")

    def __init__(self, trained: TrainedModel, options: Options, dealer: Dealer) -> None:
        self.trained, self.options, self.dealer = trained, options, dealer

    def evaluate(self, folder: Folder) -> tuple[Scores, list[RetrievalExample]]:
        """See `TaskEvaluation`."""
        examples: list[RetrievalExample] = []

        def keep(gallery: Gallery) -> None:
            if self.dealer.rank == 0:
                examples.extend(retrieval_examples(gallery, folder.all(_lacks), folder.examples.queries))

        own = folder.own(_lacks)
        scores = evaluate_retrieval(self.trained, own.places, self.options.gallery, self.dealer, keep=keep, bad=own.bad)
        return scores, examples

    def finish(self) -> None:
        """Nothing to do."""


def evaluate_retrieval(
    trained: TrainedModel,
    samples: Iterable[Sample | None],
    gallery: int,
    dealer: Dealer | None = None,
    coco_media: int = COCO_MEDIA,
    keep: Callable[[Gallery], None] | None = None,
    bad: Bad = end,
) -> dict[str, float]:
    """`retrieval_metrics` over the first `gallery` readable samples with different content and all their captions; plus
    `samples`, and `coco_metrics` if the gallery has `coco_media` media. Samples with the same content would count as
    errors of each other. {} without samples.

    `samples`: this rank's, with captions; None for one that is passed over. `bad` is called for those that cannot be
    read. The result is the same on every rank. `keep` is called with the gallery, for examples. Collective.
    """
    dealer = dealer or Dealer()
    shown = _gallery(trained, iter(samples), gallery, dealer, bad)
    if not shown:
        return {}
    texts = [caption for one in shown for caption in one.captions]
    media = np.concatenate([one.embedding for one in shown])
    media_of_text = np.repeat(np.arange(len(shown)), [len(one.captions) for one in shown])
    text = _embed_texts(trained, texts, dealer)
    if keep is not None:
        keep(Gallery(media, text, media_of_text, [one.pair for one in shown], texts))
    found: dict[str, float] = {"samples": len(media), **retrieval_metrics(media, text, media_of_text)}
    return found | coco_metrics(media, text, media_of_text, coco_media) | _spoken_metrics(shown)


def _spoken_metrics(shown: list[_Shown]) -> dict[str, float]:
    """Of the pictures and videos that have a recording: `spoken`, their number, and how soon each is found among them,
    as `speech_to_media_...`. {} without any."""
    heard = [(one.embedding, one.spoken) for one in shown if one.spoken is not None]
    if not heard:
        return {}
    media, spoken = (np.concatenate(side) for side in zip(*heard, strict=True))
    found = retrieval_metrics(media, spoken, np.arange(len(media)))
    by_text = {name: value for name, value in found.items() if name.startswith("text_to_media")}
    return {"spoken": len(media), **{name.replace("text_", "speech_"): value for name, value in by_text.items()}}


def _gallery(
    trained: TrainedModel, samples: Iterator[Sample | None], size: int, dealer: Dealer, bad: Bad
) -> list[_Shown]:
    """The first `size` readable samples with different content, in order, on every rank.

    A round covers as many consecutive samples as are missing, each on its rank: no rank reads a sample that one rank
    alone would not read, and the gallery is the same.
    """
    shown: list[_Shown] = []
    seen: set[int] = set()
    first, own_ended, ended = 0, False, False
    while len(shown) < size and not ended:
        own: list[tuple[int, _Shown]] = []
        own_pairs: set[int] = set()
        after = first + size - len(shown)
        for number in range(first + (dealer.rank - first) % dealer.count, after, dealer.count):
            try:
                sample = next(samples)
            except StopIteration:
                own_ended = True
                break
            if sample is None or (pair := pair_id(sample)) in seen or pair in own_pairs:
                continue
            try:
                own.append((number, _embed_sample(trained, sample, pair)))
            except DataError as error:
                bad(sample, error)
                continue
            own_pairs.add(pair)
        first = after
        for one in dealer.merge(own):
            if one.pair not in seen:
                seen.add(one.pair)
                shown.append(one)
        ended = all(dealer.gather(own_ended))
    return shown


def _embed_sample(trained: TrainedModel, sample: Sample, pair: int) -> _Shown:
    """Raises DataError if the sample cannot be read."""
    hears = trained.recipe.model.hears and sample.recording is not None
    spoken = embed_recordings(trained, [sample]) if hears else None
    return _Shown(pair, embed_media(trained, [sample]), list(contents_of(sample).captions), spoken)


def _lacks(sample: Sample) -> str:
    return contents_of(sample).no_caption


def _embed_texts(trained: TrainedModel, texts: list[str], dealer: Dealer) -> np.ndarray:
    """float32 [m, W]. Batches are the same for any number of ranks, so the result is bitwise the same."""
    batches = [texts[i : i + _BATCH_TEXTS] for i in range(0, len(texts), _BATCH_TEXTS)]
    numbers = range(dealer.rank, len(batches), dealer.count)
    return np.concatenate(dealer.merge([(number, embed_texts(trained, batches[number])) for number in numbers]))
