"""Transcripts of held-out recordings: generated, printed beside what was said, scored, and shown in the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.examples import Chosen
from dsmoe_vl.evaluation.task_evaluation import Answer, Bad, Folder, Options, Scores, end, merged, print_text, written
from dsmoe_vl.inference.generate import transcribe
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.metrics.word_errors import transcript_metrics
from dsmoe_vl.report import TEMPLATES
from dsmoe_vl.report.content import CaptionExample, CaptionExamples, ScoreLabel, Section


@dataclass(frozen=True)
class Transcribed:
    """One held-out sample with the words that the model heard."""

    sample: Sample
    generated: str


class TranscriptEvaluation:
    """Word errors against the transcripts of the samples that have a recording."""

    labels = {  # noqa: RUF012
        "samples": ScoreLabel("recordings transcribed", "count"),
        "word_error_rate": ScoreLabel("word error rate, %", "percent"),
        "exact": ScoreLabel("without an error, %", "percent"),
    }
    section = Section("transcripts", "Transcripts beside what was said", TEMPLATES / "captions.html")

    def __init__(self, trained: TrainedModel, options: Options, dealer: Dealer) -> None:
        self.trained, self.options, self.dealer = trained, options, dealer

    def evaluate(self, folder: Folder) -> tuple[Scores, CaptionExamples | None]:
        """See `TaskEvaluation`."""
        samples, chosen = folder.own(), Chosen[CaptionExample](folder.examples.captions, 0)

        def watched() -> Iterator[Transcribed]:
            for result in transcribe_samples(self.trained, samples, self.options.max_tokens, samples.bad):
                chosen.offer(result.sample.key, partial(_example, result))
                yield result

        results = merged(watched(), samples, self.dealer)
        shown = chosen.merged(self.dealer)
        folder.answers.extend(
            Answer(result.sample.key, (_said(result.sample),), result.generated, {}) for result in results
        )
        for result in results[: self.options.show]:
            print_text(result.sample, result.generated, _said(result.sample))
        if not results:
            return {}, None
        scores = transcript_metrics(
            [result.generated for result in results], [_said(result.sample) for result in results], self.options.split
        )
        return {"samples": len(results), **scores}, CaptionExamples(shown) if shown else None

    def finish(self) -> None:
        """Nothing to do."""


def transcribe_samples(
    trained: TrainedModel, samples: Iterator[Sample], max_tokens: int, bad: Bad = end
) -> Iterator[Transcribed]:
    """Transcribe recordings, in order; `bad` is called for those that cannot be read."""
    for sample, text in written(samples, lambda some: transcribe(trained, some, max_tokens), bad):
        yield Transcribed(sample, text)


def _said(sample: Sample) -> str:
    return contents_of(sample).transcript


def _example(result: Transcribed) -> CaptionExample:
    return CaptionExample(result.sample.key, [], result.generated, [_said(result.sample)], None)
