"""Do predicted importance curves and summaries agree with those of the samples?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dsmoe_vl.data.segment import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.captions import names_every_object
from dsmoe_vl.evaluation.summary_metrics import kendall_tau_b, key_frame_f, spearman_rho
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.summarize import VideoSummary, summarize
from dsmoe_vl.tasks.video_summary import importance_curve


@dataclass(frozen=True)
class Summarized:
    """One video with its predicted summary; `scores` compare the importance of all annotated parts of the video."""

    sample: Sample
    summary: VideoSummary
    scores: dict[str, float]


def summarize_samples(trained: TrainedModel, samples: Iterator[Sample], max_tokens: int) -> Iterator[Summarized]:
    """Every video that can be read and has an importance curve, in order."""
    for sample in samples:
        try:
            (summary,) = summarize(trained, [sample], max_tokens)
            truth, duration = importance_curve(sample)
        except DataError:
            continue
        predicted = summary.at(np.arange(len(truth)) * duration / len(truth))
        scores = {
            "key_frame_f": key_frame_f(predicted, truth),
            "kendall_tau": kendall_tau_b(predicted, truth),
            "spearman_rho": spearman_rho(predicted, truth),
            "importance_error": float(np.abs(predicted - truth).mean()),
        }
        if attributes := sample.meta.get("attributes"):
            scores["attribute_accuracy"] = float(names_every_object(summary.text, attributes))
        yield Summarized(sample, summary, scores)


def mean_scores(results: list[Summarized]) -> dict[str, float]:
    """The mean of every score over the videos that have it, and `samples`. {} for none."""
    if not results:
        return {}
    names = dict.fromkeys(name for result in results for name in result.scores)
    values = {name: [result.scores[name] for result in results if name in result.scores] for name in names}
    return {"samples": len(results), **{name: float(np.mean(value)) for name, value in values.items()}}
