"""Scores video summaries of held-out samples: importance curves and texts against the annotations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.examples import Chosen
from dsmoe_vl.evaluation.frame_features import frame_features
from dsmoe_vl.evaluation.storyboards import storyboard
from dsmoe_vl.evaluation.task_evaluation import Answer, Bad, Folder, Options, Scores, end, merged, print_text
from dsmoe_vl.evaluation.texts import TEXT_LABELS, names_every_object, text_scores
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.summarize import VideoSummary, summarize
from dsmoe_vl.metrics.importance import kendall_tau_b, key_frame_f, spearman_rho
from dsmoe_vl.metrics.shots import MAX_FRAMES, segment, unit_features
from dsmoe_vl.metrics.summary_protocols import frames_of_parts, protocol_scores, times_of_parts
from dsmoe_vl.report import TEMPLATES
from dsmoe_vl.report.content import ScoreLabel, Section, Storyboard
from dsmoe_vl.tasks.video_summary import annotated_curves

_LABELS = {
    **TEXT_LABELS,
    "samples": ScoreLabel("videos summarized", "count"),
    "key_frame_f": ScoreLabel("key frames in common with the annotation (F, 0 to 1)"),
    "kendall_tau": ScoreLabel("rank correlation with the annotation (Kendall's τ, -1 to 1)"),
    "spearman_rho": ScoreLabel("rank correlation with the annotation (Spearman's ρ, -1 to 1)"),
    "importance_error": ScoreLabel("mean absolute error of importance (0 to 1)"),
    "user_kendall_tau": ScoreLabel("mean rank correlation with each annotator (Kendall's τ, -1 to 1)"),
    "user_spearman_rho": ScoreLabel("mean rank correlation with each annotator (Spearman's ρ, -1 to 1)"),
    "tvsum_f": ScoreLabel("key shots as TVSum counts them (F, 0 to 1)"),
    "summe_f": ScoreLabel("key shots as SumMe counts them (F, 0 to 1)"),
    "videoxum_f": ScoreLabel("frames as VideoXum counts them (F, 0 to 1)"),
}


@dataclass(frozen=True)
class Summarized:
    """One video with its predicted summary; `scores` compare importance over all annotated parts of the video."""

    sample: Sample
    summary: VideoSummary
    scores: dict[str, float]


class SummaryEvaluation:
    """Importance curves against the annotated ones, and summaries against the references."""

    labels = _LABELS
    section = Section("summaries", "Videos: importance over time and key frames", TEMPLATES / "summaries.html")

    def __init__(self, trained: TrainedModel, options: Options, dealer: Dealer) -> None:
        self.trained, self.options, self.dealer = trained, options, dealer

    def evaluate(self, folder: Folder) -> tuple[Scores, list[Storyboard]]:
        """See `TaskEvaluation`."""
        samples, boards = folder.own(_lacks), Chosen[Storyboard](folder.examples.videos, seed=0)
        found = summarize_samples(self.trained, samples, self.options.max_tokens, samples.bad)
        videos = merged(self._watched(found, boards), samples, self.dealer)
        folder.answers.extend(
            Answer(video.sample.key, [_reference(video.sample)], video.summary.text, video.scores) for video in videos
        )
        for video in videos[: self.options.show]:
            peak = video.summary.seconds[video.summary.importance.argmax()]
            print_text(video.sample, f"{video.summary.text} (peak at {peak:.2f} s)", _reference(video.sample))
        texts = ((video.summary.text, [_reference(video.sample)]) for video in videos)
        scores = mean_scores(videos) | text_scores(texts, self.options.split, self.options.java)
        return scores, boards.merged(self.dealer)

    def finish(self) -> None:
        """Nothing to do."""

    def _watched(self, results: Iterable[Summarized], boards: Chosen[Storyboard]) -> Iterator[Summarized]:
        """Yield the same results, and offer each one to the report."""
        for result in results:
            boards.offer(result.sample.key, partial(self._storyboard, result))
            yield result

    def _storyboard(self, result: Summarized) -> Storyboard:
        return storyboard(result.sample, result.summary, result.scores, self.trained.recipe.data)


def summarize_samples(
    trained: TrainedModel, samples: Iterator[Sample], max_tokens: int, bad: Bad = end
) -> Iterator[Summarized]:
    """Summarize videos, in order; `bad` is called for those that cannot be read, or whose importance curve cannot."""
    for sample in samples:
        try:
            (summary,) = summarize(trained, [sample], max_tokens)
            scores = importance_scores(trained, sample, summary)
        except DataError as error:
            bad(sample, error)
            continue
        named = names_every_object(summary.text, sample)
        if named is not None:
            scores["attribute_accuracy"] = float(named)
        yield Summarized(sample, summary, scores)


def importance_scores(trained: TrainedModel, sample: Sample, summary: VideoSummary) -> dict[str, float]:
    """Scores of a predicted curve, read in each annotated part, against the annotators' mean. If KEY.json has
    `saliency`, also against each annotator, by the protocol of its `source` (`summary_protocols.protocol_scores`).

    Raises DataError if the sample has no curve or its video cannot be read.
    """
    curves, duration = annotated_curves(sample)
    truth, source = curves.mean(axis=0, dtype=np.float32), str(sample.meta.get("source", ""))
    lengths = frames_of_parts(source, len(truth), sample.meta.get("annotated_frames"))
    predicted = summary.at(times_of_parts(source, lengths, duration, sample.meta.get("fps")))
    scores = {
        "key_frame_f": key_frame_f(predicted, truth),
        "kendall_tau": kendall_tau_b(predicted, truth),
        "spearman_rho": spearman_rho(predicted, truth),
        "importance_error": float(np.abs(predicted - truth).mean()),
    }
    if sample.meta.get("saliency"):
        scores |= protocol_scores(source, predicted, curves, lengths, lambda: shot_borders(trained, sample, len(truth)))
    return scores


def shot_borders(trained: TrainedModel, sample: Sample, parts: int) -> np.ndarray:
    """Shot borders of a video with P annotated parts, in units of parts: int64 [S + 1] from 0 to P.

    Kernel temporal segmentation of one frame per part, MAX_FRAMES at most, by features of the run's own encoder.
    Published numbers use GoogLeNet features and depend on the shots: compare with care.

    Raises DataError if the video cannot be read.
    """
    features = frame_features(trained, sample, min(parts, MAX_FRAMES))
    borders = segment(unit_features(features))
    return np.unique(np.rint(borders * (parts / len(features))).astype(np.int64))


def mean_scores(results: list[Summarized]) -> dict[str, float]:
    """The mean of every score over the videos that have it, and `samples`. {} without videos."""
    if not results:
        return {}
    names = dict.fromkeys(name for result in results for name in result.scores)
    values = {name: [result.scores[name] for result in results if name in result.scores] for name in names}
    return {"samples": len(results), **{name: float(np.mean(value)) for name, value in values.items()}}


def _lacks(sample: Sample) -> str:
    scored = sample.meta.get("saliency") is not None or sample.meta.get("importance") is not None
    return "" if scored else "no importance of frames: neither `saliency` nor `importance` in KEY.json"


def _reference(sample: Sample) -> str:
    return contents_of(sample).summary
