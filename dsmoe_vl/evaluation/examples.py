"""The examples of a report, chosen while an evaluation runs: by a seeded hash of a sample's name, so that neither the
order nor the number of ranks changes the choice, and two runs on the same shards show the same pictures.

Shapes: n media and m texts of the gallery, W width of an embedding, f frames that the model has seen.
"""

from __future__ import annotations

import hashlib
import io
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from PIL import Image

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.decode import decode_image, decode_video, iterate_video
from dsmoe_vl.data.segment import Sample
from dsmoe_vl.data.shards.index import VIDEO_EXTENSIONS
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.captions import Captioned
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.retrieval import Gallery
from dsmoe_vl.evaluation.summaries import Summarized
from dsmoe_vl.report.content import (
    Candidate,
    CaptionExample,
    FolderExamples,
    RetrievalExample,
    Storyboard,
    Thumbnail,
)
from dsmoe_vl.tasks.caption import captions_of
from dsmoe_vl.tasks.retrieval import pair_id
from dsmoe_vl.tasks.video_summary import annotated_curves

TOP = 5  # candidates of a query
_SIDE = 192  # pixels of a thumbnail's longer side: enough for a card on a phone's dense screen
_QUALITY = 80
_VIDEO_FRAMES = 4  # of a captioned video
_STORYBOARD_FRAMES = 12  # at most
_SMALLER = 96  # pixels of the side of what is shown many times
_TIE = 1e-6  # as in retrieval_metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """Examples of one folder at most: captions, more of wrong ones, queries in each direction, videos."""

    captions: int = 8
    wrong: int = 4
    queries: int = 4
    videos: int = 3

    @staticmethod
    def of(folders: int) -> Counts:
        """Fewer of each where there are many folders, so that the page stays small."""
        return Counts(*(max(1, min(most, most * 6 // max(folders, 1))) for most in (8, 4, 4, 3)))


class Chosen(Generic[T]):
    """At most `count` of the values that are offered."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self.entries: list[tuple[int, str, T]] = []  # the smallest hashes so far, in order, with the names

    def offer(self, name: str, make: Callable[[], T]) -> None:
        """Keep what `make` returns, if `name` is among the chosen so far. What raises DataError is passed over."""
        priority = _hash(self._seed, name)
        if len(self.entries) == self._count and (not self._count or priority >= self.entries[-1][0]):
            return
        try:
            self._insert((priority, name, make()))
        except DataError:
            return

    def merged(self, dealer: Dealer) -> list[T]:
        """The chosen of all ranks, in the order of their names. Collective."""
        everywhere = sorted(
            (entry for entries in dealer.gather(self.entries) for entry in entries), key=lambda entry: entry[:2]
        )
        return [value for _, _, value in sorted(everywhere[: self._count], key=lambda entry: entry[1])]

    def _insert(self, entry: tuple[int, str, T]) -> None:
        insort(self.entries, entry, key=lambda kept: kept[0])
        del self.entries[self._count :]


class Gatherer:
    """Keeps examples of one folder while its samples are scored."""

    def __init__(self, data: DataConfig, counts: Counts, seed: int = 0) -> None:
        self._data, self._counts, self._seed = data, counts, seed
        self._captions: Chosen[CaptionExample] = Chosen(counts.captions, seed)
        self._wrong: Chosen[CaptionExample] = Chosen(counts.captions + counts.wrong, seed)
        self._storyboards: Chosen[Storyboard] = Chosen(counts.videos, seed)
        self._retrieval: list[RetrievalExample] = []

    def captions(self, results: Iterable[Captioned]) -> Iterator[Captioned]:
        """The same results; looks at them as they pass."""
        for result in results:
            for chosen in (self._captions, self._wrong) if result.correct is False else (self._captions,):
                chosen.offer(result.sample.key, lambda result=result: caption_example(result))  # type: ignore[misc]
            yield result

    def summaries(self, results: Iterable[Summarized]) -> Iterator[Summarized]:
        """The same results; looks at them as they pass."""
        for result in results:
            self._storyboards.offer(
                result.sample.key,
                lambda result=result: storyboard(result, self._data),  # type: ignore[misc]
            )
            yield result

    def retrieval(self, gallery: Gallery, samples: Iterable[Sample]) -> None:
        """Choose queries and look up their candidates. `samples`: those of the folder once more, for the pictures."""
        self._retrieval = retrieval_examples(gallery, samples, self._counts.queries, self._seed)

    def gathered(self, dealer: Dealer) -> FolderExamples:
        """What was kept, on every rank, but for the retrieval, which this one has kept. Collective."""
        captions = self._captions.merged(dealer)
        shown = {example.key for example in captions}
        more = [example for example in self._wrong.merged(dealer) if example.key not in shown]
        return FolderExamples(captions, more[: self._counts.wrong], self._retrieval, self._storyboards.merged(dealer))


def caption_example(result: Captioned) -> CaptionExample:
    """Raises DataError where the picture cannot be read."""
    sample = result.sample
    references = [text for text in captions_of(sample) if text.strip()]
    return CaptionExample(sample.key, thumbnails(sample, _VIDEO_FRAMES), result.generated, references, result.correct)


def storyboard(result: Summarized, data: DataConfig) -> Storyboard:
    """`data`: the recipe's, which says what frames the model has seen. Raises DataError where they cannot be read."""
    sample, summary = result.sample, result.summary
    curves, duration = annotated_curves(sample)
    keys = summary.key_frames()
    shown = set(_storyboard_frames(keys, summary.importance))
    assert sample.media is not None, "it has been summarized"
    frames = {
        number: thumbnail(pixels, _SMALLER)
        for number, (_, pixels) in enumerate(
            iterate_video(sample.media, data.video_frames, data.video_sampling, data.video_fps)
        )
        if number in shown
    }
    return Storyboard(
        key=sample.key,
        seconds=summary.seconds,
        importance=summary.importance,
        annotated=curves.mean(axis=0, dtype=np.float32),
        annotators=len(curves),
        duration_seconds=duration,
        frames=frames,
        key_frames=keys,
        generated=summary.text,
        reference=str(sample.meta.get("summary", "")),
        scores=result.scores,
    )


def retrieval_examples(
    gallery: Gallery, samples: Iterable[Sample], queries: int, seed: int = 0
) -> list[RetrievalExample]:
    """`queries` media, chosen by their pairs, in both directions: as a query for texts, and their first text as a query
    for media. `samples` hold the gallery's, and give the pictures; one that cannot be found has none."""
    if not len(gallery.media):
        return []
    chosen = sorted(range(len(gallery.media)), key=lambda row: _hash(seed, str(gallery.pairs[row])))[:queries]
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


def thumbnails(sample: Sample, frames: int) -> list[Thumbnail]:
    """The image, or so many frames of the video. Raises DataError."""
    if sample.media is None:
        raise DataError("no image or video")
    if sample.media_type in VIDEO_EXTENSIONS:
        return [thumbnail(pixels, _SMALLER) for _, pixels in decode_video(sample.media, frames)]
    return [thumbnail(decode_image(sample.media, enough_pixels=4 * _SIDE**2), _SIDE)]


def thumbnail(pixels: np.ndarray, side: int) -> Thumbnail:
    """Pixels [h, w, 3], made smaller where the longer side is above `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return Thumbnail(file.getvalue(), image.width, image.height)


def _example(
    direction: Literal["text_to_media", "media_to_text"],
    text: str,
    picture: Thumbnail | None,
    scores: np.ndarray,
    right: np.ndarray,
    candidate: Callable[[int, float, bool], Candidate],
) -> RetrievalExample:
    """scores float [c], right bool [c] of all candidates."""
    best = int(np.flatnonzero(right)[scores[right].argmax()])
    # A wrong candidate that is not clearly beaten stands before the right one, as in the metrics.
    place = 1 + int(np.count_nonzero(~right & ~(scores < scores[best] - _TIE)))
    found = [candidate(i, float(scores[i]), bool(right[i])) for i in _best(scores)]
    return RetrievalExample(
        direction, text, picture, found, candidate(best, float(scores[best]), True), place, len(scores)
    )


def _best(scores: np.ndarray) -> list[int]:
    return np.argsort(-scores, kind="stable")[:TOP].tolist()


def _pictures(samples: Iterable[Sample], pairs: set[int]) -> dict[int, Thumbnail]:
    """The first readable picture with a caption of each pair, as the gallery took it; the middle frame of a video."""
    found: dict[int, Thumbnail] = {}
    for sample in samples:
        if len(found) == len(pairs):
            break
        pair = pair_id(sample)
        if pair in found or pair not in pairs or not any(text.strip() for text in captions_of(sample)):
            continue
        try:
            found[pair] = thumbnails(sample, 1)[0]
        except DataError:
            continue
    return found


def _storyboard_frames(keys: Sequence[int], importance: np.ndarray) -> list[int]:
    """Numbers of the frames to show: the most important key frames, and others in even steps where there is room."""
    shown = sorted(keys, key=lambda number: -float(importance[number]))[:_STORYBOARD_FRAMES]
    others = sorted(set(range(len(importance))) - set(shown))
    room = min(_STORYBOARD_FRAMES - len(shown), len(others))
    steps = np.linspace(0, len(others) - 1, room).round().astype(int)
    return sorted([*shown, *(others[step] for step in steps)])


def _hash(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
