"""The interface of a task's evaluation: scores on a folder of shards, and examples for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.config.task_table import TaskSpec
from dsmoe_vl.console import one_line, printable
from dsmoe_vl.data.contents import why_unused
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.index import ShardIndex, read_sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.dealing import Dealer, Dealt
from dsmoe_vl.evaluation.examples import Counts
from dsmoe_vl.evaluation.passed_over import PassedOver
from dsmoe_vl.inference.generate import MAX_TOKENS
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.report.content import ScoreLabel, Section

Scores = dict[str, float]

Bad = Callable[[Sample, DataError], None]  # called for a sample that cannot be used

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
    max_bad_fraction: float | None = None  # of the samples of a folder; default: the recipe's data.max_bad_fraction


@dataclass(frozen=True)
class Answer:
    """A generated text, the references of its sample, and its own scores."""

    key: str
    references: Sequence[str]
    text: str
    scores: Scores


def _nothing(sample: Sample) -> str:
    return ""


@dataclass(frozen=True)
class Folder:
    """One folder of shards for one task, on this rank: a held-out source of the recipe, or one made of a path.
    `examples`: how many the report shows. `passed`: what `own` has passed over. `answers`: a task that generates texts
    appends those of all ranks.

    Only samples that training would use for the task are given (`data/contents.py: why_unused`). An evaluation may need
    more of them: its `lacks` says what a sample lacks, as `kind: detail`, "" if nothing."""

    task: TaskSpec
    source: SourceConfig
    index: ShardIndex
    dealer: Dealer
    limit: int | None
    examples: Counts
    passed: PassedOver
    answers: list[Answer] = field(default_factory=list)

    @classmethod
    def open(
        cls, task: TaskSpec, source: SourceConfig, data: DataConfig, dealer: Dealer, limit: int | None, examples: Counts
    ) -> Folder:
        """Raises the errors of `ShardIndex.load`."""
        index = ShardIndex.load(source.path, data)
        return cls(
            task, source, index, dealer, limit, examples, PassedOver(source, index, data.max_bad_fraction, limit)
        )

    def own(self, lacks: Callable[[Sample], str] = _nothing) -> Dealt:
        """This rank's samples of the task, in order."""
        samples = self._read(self.dealer.rank, self.dealer.count, lacks, self.passed)
        return Dealt(samples, self.dealer, self.passed.bad)

    def all(self, lacks: Callable[[Sample], str] = _nothing) -> Iterator[Sample]:
        """Every rank's samples of the task, in order. What it passes over, `own` counts."""
        return (sample for sample in self._read(0, 1, lacks, None) if sample is not None)

    def _read(
        self, rank: int, ranks: int, lacks: Callable[[Sample], str], passed: PassedOver | None
    ) -> Iterator[Sample | None]:
        for number, (shard, place) in islice(enumerate(self.index.places()), rank, self.limit, ranks):
            sample, key, reason, is_bad = None, "", "", False
            try:
                sample = read_sample(self.index, shard, place, self.source)
                key = sample.key
                reason = why_unused(sample, self.task) or lacks(sample)
            except DataError as error:
                reason, is_bad = str(error), True
            if passed is not None:
                passed.read()
                if is_bad:
                    passed.bad(number, reason, key)
                elif reason:
                    passed.other(reason)
            yield None if reason else sample


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


def end(sample: Sample, error: DataError) -> None:
    """What is done with a bad sample by default: it ends the work."""
    raise error


def written(
    samples: Iterable[Sample], write: Callable[[list[Sample]], list[str]], bad: Bad = end
) -> Iterator[tuple[Sample, str]]:
    """Every sample with the text that `write` makes of it, in order, batch by batch. `bad` is called for one of which
    it cannot make a text (DataError)."""
    waiting = iter(samples)
    while batch := list(islice(waiting, _BATCH_SAMPLES)):
        yield from _written_batch(batch, write, bad)


def _written_batch(
    batch: list[Sample], write: Callable[[list[Sample]], list[str]], bad: Bad
) -> Iterator[tuple[Sample, str]]:
    try:
        texts = write(batch)
    except DataError as error:
        if len(batch) == 1:
            bad(batch[0], error)
            return
        for sample in batch:  # find the one that cannot be read
            yield from _written_batch([sample], write, bad)
        return
    yield from zip(batch, texts, strict=True)


def print_text(sample: Sample, generated: str, reference: str) -> None:
    """A generated text next to its reference."""
    print(f"  {printable(sample.key)}\n    generated  {one_line(generated)}\n    reference  {one_line(reference)}")
