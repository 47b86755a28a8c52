"""Captions of held-out samples: generated, printed beside their references, scored, and shown in the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from PIL import Image

from dsmoe_vl.console import tell
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.decode import pictures_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.drawing.contact_sheet import Cell, contact_sheet
from dsmoe_vl.drawing.picture_file import save_picture
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.examples import Chosen, Counts, thumbnails
from dsmoe_vl.evaluation.task_evaluation import Answer, Bad, Folder, Options, Scores, end, merged, print_text, written
from dsmoe_vl.evaluation.texts import TEXT_LABELS, names_every_object, text_scores
from dsmoe_vl.inference.generate import caption
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.report import TEMPLATES
from dsmoe_vl.report.content import CaptionExample, CaptionExamples, ScoreLabel, Section

_VIDEO_FRAMES = 4  # shown of a captioned video
_LABELS = {
    **TEXT_LABELS,
    "samples": ScoreLabel("samples captioned", "count"),
    "with_truth": ScoreLabel("captions whose truth is known", "count"),
    "correct": ScoreLabel("of these, name every object's colour and shape", "count"),
}


@dataclass(frozen=True)
class Captioned:
    """One held-out sample with its generated caption. `correct` is None where the truth is unknown."""

    sample: Sample
    generated: str
    correct: bool | None


class CaptionEvaluation:
    """Scores captions against the references, and counts those that name every object if samples list `attributes`.
    The printed captions are drawn to `samples/captions.png` of the run."""

    labels = _LABELS
    section = Section("captions", "Generated captions beside their references", TEMPLATES / "captions.html")

    def __init__(self, trained: TrainedModel, options: Options, dealer: Dealer) -> None:
        self.trained, self.options, self.dealer = trained, options, dealer
        self.shown: list[Captioned] = []

    def evaluate(self, folder: Folder) -> tuple[Scores, CaptionExamples | None]:
        """See `TaskEvaluation`."""
        samples, examples = folder.own(), CaptionChoice(folder.examples)
        found = examples.watch(caption_samples(self.trained, samples, self.options.max_tokens, samples.bad))
        results = merged(found, samples, self.dealer, whole=self.options.show)
        folder.answers.extend(_answer(result) for result in results)
        return self.scores(results), examples.merged(self.dealer)

    def finish(self) -> None:
        """Draw the printed captions."""
        if self.shown:
            sheet = self.options.run / "samples" / "captions.png"
            sheet.parent.mkdir(exist_ok=True)
            cells = [
                Cell(
                    [Image.fromarray(pixels) for pixels in pictures_of(result.sample, _VIDEO_FRAMES)], result.generated
                )
                for result in self.shown
            ]
            save_picture(contact_sheet(cells), sheet)
            tell(f"wrote {sheet}")

    def scores(self, results: list[Captioned]) -> Scores:
        """Print the first results, and compute the scores."""
        for result in results[: self.options.show]:
            self.shown.append(result)
            print_text(result.sample, result.generated, _reference(result.sample))
        judged = [result.correct for result in results if result.correct is not None]
        scores: Scores = {"samples": len(results)}
        if judged:
            accuracy = sum(judged) / len(judged)
            scores |= {"with_truth": len(judged), "correct": sum(judged), "attribute_accuracy": accuracy}
            right = f"{sum(judged)} of {len(judged)} captions name every object's colour and shape"
            print(f"{right} ({accuracy:.1%})")
        texts = ((result.generated, list(contents_of(result.sample).captions)) for result in results)
        return scores | text_scores(texts, self.options.split, self.options.java)


class CaptionChoice:
    """Chooses captions for the report: some at random, and additional wrong ones."""

    def __init__(self, counts: Counts, seed: int = 0) -> None:
        self._counts = counts
        self._random: Chosen[CaptionExample] = Chosen(counts.captions, seed)
        self._wrong: Chosen[CaptionExample] = Chosen(counts.captions + counts.wrong, seed)

    def watch(self, results: Iterable[Captioned]) -> Iterator[Captioned]:
        """Yield the same results, and offer each one to the report."""
        for result in results:
            for chosen in (self._random, self._wrong) if result.correct is False else (self._random,):
                chosen.offer(result.sample.key, partial(caption_example, result))
            yield result

    def merged(self, dealer: Dealer) -> CaptionExamples | None:
        """The choice of all ranks, None if there is nothing to show. Collective."""
        random = self._random.merged(dealer)
        shown = {example.key for example in random}
        more = [example for example in self._wrong.merged(dealer) if example.key not in shown]
        return CaptionExamples(random, more[: self._counts.wrong]) if random else None


def _answer(result: Captioned) -> Answer:
    scores = {} if result.correct is None else {"attribute_accuracy": float(result.correct)}
    return Answer(result.sample.key, contents_of(result.sample).captions, result.generated, scores)


def _reference(sample: Sample) -> str:
    return next(iter(contents_of(sample).captions), "")


def caption_example(result: Captioned) -> CaptionExample:
    """Raises DataError if the picture cannot be read."""
    sample = result.sample
    references = list(contents_of(sample).captions)
    return CaptionExample(sample.key, thumbnails(sample, _VIDEO_FRAMES), result.generated, references, result.correct)


def caption_samples(
    trained: TrainedModel, samples: Iterator[Sample], max_tokens: int, bad: Bad = end
) -> Iterator[Captioned]:
    """Caption every sample, in order, batch by batch; `bad` is called for those that cannot be read."""
    for sample, text in written(samples, lambda some: caption(trained, some, max_tokens), bad):
        yield Captioned(sample, text, names_every_object(text, sample))
