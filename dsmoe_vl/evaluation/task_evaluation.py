"""The interface of a task's evaluation: scores on a folder of shards, and examples for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.console import one_line, printable
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.dealing import Dealer, Dealt
from dsmoe_vl.evaluation.examples import Counts
from dsmoe_vl.inference.generate import MAX_TOKENS
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.report.content import ScoreLabel, Section

Scores = dict[str, float]

_BATCH_SAMPLES = 32


class HasSample(Protocol):
    """The result of one sample; a dataclass."""

    @property
    def sample(self) -> Sample: ...


Result = TypeVar("Result", bound=HasSample)


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation."""

    run: Path
    folders: tuple[str, ...] = ()  # of shards, or URLs; default: the recipe's held-out sources
    tasks: tuple[str, ...] = ()  # default: all learned tasks
    limit: int | None = None  # maximum samples per folder
    gallery: int = 200  # samples with different content that retrieval searches
    show: int = 6  # texts to print per folder
    max_tokens: int = MAX_TOKENS  # per text
    device: str = "cpu"
    split: str = "words"  # of texts, for their scores: a key of `metrics/captions.py: SPLITS`
    java: str = ""  # scores of texts by Java: one of `metrics/meteor_spice.py: CHOICES`
    lmms: bool = False  # also write the scores as lmms-eval does


@dataclass(frozen=True)
class Answer:
    """A generated text, the references of its sample, and its own scores."""

    key: str
    references: Sequence[str]
    text: str
    scores: Scores


@dataclass(frozen=True)
class Folder:
    """One folder of shards for one task, on this rank: a held-out source of the recipe, or one made of a path.
    `examples`: how many the report shows. `answers`: a task that generates texts appends those of all ranks."""

    source: SourceConfig
    data: DataConfig
    dealer: Dealer
    limit: int | None
    examples: Counts
    answers: list[Answer] = field(default_factory=list)

    def own(self) -> Dealt:
        """This rank's samples, in order."""
        dealer = self.dealer
        own = iterate_samples(self.source, data=self.data, first=dealer.rank, step=dealer.count)
        return Dealt(islice(own, None if self.limit is None else dealer.own(self.limit)), dealer)

    def all(self) -> Iterator[Sample]:
        """Every rank's samples, in order."""
        return islice(iterate_samples(self.source, data=self.data), self.limit)


class TaskEvaluation(Protocol):
    """Evaluates one task. `labels`: display names of its scores; `section`: its part of the report, if any."""

    labels: ClassVar[Mapping[str, ScoreLabel]]
    section: ClassVar[Section | None]

    def __init__(self, trained: TrainedModel, options: Options, dealer: Dealer) -> None: ...

    def evaluate(self, folder: Folder) -> tuple[Scores, Any]:
        """Scores (the same on every rank but for those by Java, {} if nothing could be scored) and the examples for
        `section` (on rank 0). May print samples. Raises DsmoeVlError. Collective."""

    def finish(self) -> None:
        """Called on rank 0 after the last folder."""


def merged(found: Iterable[Result], samples: Dealt, dealer: Dealer, whole: int = 0) -> list[Result]:
    """The results of all ranks in the order of their samples. Only the first `whole` of each rank keep their picture or
    video, for display: all of them would not fit into memory. Collective."""
    own: list[tuple[int, Result]] = []
    for result in found:
        sample, number = result.sample, samples.number(result.sample)
        kept = sample if len(own) < whole else replace(sample, media=None, recording=None)
        own.append((number, replace(result, sample=kept)))  # type: ignore[type-var]
    return dealer.merge(own)


def written(samples: Iterable[Sample], write: Callable[[list[Sample]], list[str]]) -> Iterator[tuple[Sample, str]]:
    """Every sample with the text that `write` makes of it, in order, batch by batch. One of which it cannot make a text
    (DataError) is skipped."""
    waiting = iter(samples)
    while batch := list(islice(waiting, _BATCH_SAMPLES)):
        yield from _written_batch(batch, write)


def _written_batch(batch: list[Sample], write: Callable[[list[Sample]], list[str]]) -> Iterator[tuple[Sample, str]]:
    try:
        texts = write(batch)
    except DataError:
        if len(batch) > 1:  # find the one that cannot be read
            for sample in batch:
                yield from _written_batch([sample], write)
        return
    yield from zip(batch, texts, strict=True)


def print_text(sample: Sample, generated: str, reference: str) -> None:
    """A generated text next to its reference."""
    print(f"  {printable(sample.key)}\n    generated  {one_line(generated)}\n    reference  {one_line(reference)}")
