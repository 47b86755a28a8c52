"""The tasks that a model can learn, one row each. All code that lists or counts tasks reads this table.

A new task needs a settings class, a row in `TASKS`, and the two classes that the row names. This file does not import
torch, because the recipe, the planner and the data tools read it too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from dsmoe_vl.config.bounds import bounded

# The targets of a term, counted per segment by `data/pack.py`: positions with a language-model label, retrieval pairs,
# frames with an importance, or compared pairs of frames.
Targets = Literal["labels", "pairs", "frames", "comparisons"]


@dataclass(frozen=True)
class CaptionConfig:
    """Captioning of images and videos."""

    weight: float = bounded(1.0, least=0)  # w_i; 0: the task is not trained
    # fraction of a caption's tokens that are hidden from later tokens, in training only
    word_dropout: float = bounded(0.0, least=0, most=1)
    hears: bool = False  # a sample's recording stands after its picture, before the caption


ALIGNMENT = ".alignment."  # in the names of parameters that are measured, and never trained


@dataclass(frozen=True)
class RetrievalConfig:
    """Image-text and video-text retrieval."""

    weight: float = bounded(0.0, least=0)  # w_i; 0: the task is not trained
    loss: str = bounded("info_nce", choices=("info_nce", "sigmoid"))
    embedding_width: int = bounded(512, least=1)
    # what stands for a picture, a video or a text: the state of its "last" token, or the "mean" of all its tokens
    pooling: str = bounded("last", choices=("last", "mean"))
    # states first go through fixed matrices that align pictures and texts, which launch/align.py measures
    align: bool = False
    gradient_cache: bool = False  # contrast over all accumulation steps; costs a second forward
    # share of the samples with captions and a recording whose text side is the recording; it always is without captions
    spoken: float = bounded(0.0, least=0, most=1)


@dataclass(frozen=True)
class SummaryConfig:
    """Video summarization: the text, and the importance of each frame."""

    weight: float = bounded(0.0, least=0)  # w_i of the text; 0: the task is not trained
    importance_weight: float = bounded(1.0, least=0)  # of the regression to the annotators' mean importance
    ranking_weight: float = bounded(1.0, least=0)  # of the pairwise ranking loss over frames
    # smallest difference in importance, 0 to 1, at which two frames are compared
    ranking_margin: float = bounded(0.1, least=0)


@dataclass(frozen=True)
class TranscriptConfig:
    """Speech to text: the words of a recording."""

    weight: float = bounded(0.0, least=0)  # w_i; 0: the task is not trained


@dataclass(frozen=True)
class Term:
    """One term of a task's loss: `weight * sum / targets`. Its value is logged as `loss_NAME`."""

    name: str
    targets: Targets
    weight: str = "weight"  # the field of the task's settings with its weight


def _no_heads(settings: Any, width: int) -> dict[str, tuple[int, ...]]:
    return {}


def _retrieval_heads(settings: RetrievalConfig, width: int) -> dict[str, tuple[int, ...]]:
    wide, sides = settings.embedding_width, ("media", "text")
    projection = (wide, wide if settings.align else width)
    found: dict[str, tuple[int, ...]] = {"retrieval.log_scale": (1,), "retrieval.bias": (1,)}
    found |= {f"retrieval.{side}.weight": projection for side in sides}
    if settings.align:
        found |= {f"retrieval.{side}{ALIGNMENT}weight": (wide, width) for side in sides}
        found |= {f"retrieval.{side}{ALIGNMENT}bias": (wide,) for side in sides}
    return found


@dataclass(frozen=True)
class TaskSpec:
    """One task. `settings` is the dataclass of the recipe table [tasks.NAME]; its field `weight` is 0 if the task is
    not trained."""

    name: str  # used in recipes, in `tasks` of KEY.json, in metrics
    title: str  # shown to users, in the plural
    symbol: str  # the control symbol after which the task's text is generated
    settings: type[Any]
    terms: tuple[Term, ...]
    # Whether a sample can be used for the task, from what it has ("image", "video", "speech"), captions and KEY.json.
    qualifies: Callable[[Collection[str], Sequence[str], Mapping[str, Any]], bool]
    task: str  # "module:class" of its `tasks.task.Task`
    evaluation: str  # "module:class" of its `evaluation.task_evaluation.TaskEvaluation`
    # The shapes of its heads' parameters by their names in the model, from its settings and the decoder width.
    head_shapes: Callable[[Any, int], dict[str, tuple[int, ...]]] = field(default=_no_heads)
    hears: bool = False  # it needs a model with a speech encoder
    # What of `data/contents.py: Contents` a sample must have, for messages: its field `no_NEED` has the reason if not.
    needs: tuple[str, ...] = ()


def _has_captions(has: Collection[str], captions: Sequence[str], meta: Mapping[str, Any]) -> bool:
    return bool(captions) and _is_seen(has)


def _has_two_sides(has: Collection[str], captions: Sequence[str], meta: Mapping[str, Any]) -> bool:
    return _is_seen(has) and (bool(captions) or "speech" in has)


def _has_summary(has: Collection[str], captions: Sequence[str], meta: Mapping[str, Any]) -> bool:
    scored = meta.get("saliency") is not None or meta.get("importance") is not None
    return "video" in has and (scored or bool(meta.get("summary")))


def _has_transcript(has: Collection[str], captions: Sequence[str], meta: Mapping[str, Any]) -> bool:
    return "speech" in has and (bool(meta.get("transcript")) or len(captions) == 1)


def _is_seen(has: Collection[str]) -> bool:
    return "image" in has or "video" in has


# A task's number is its index here, and its row in the router's task bias. Those that need a speech encoder are last:
# a model without one has no row for them. Append a new task to its kind.
TASKS: list[TaskSpec] = [
    TaskSpec(
        name="caption",
        title="Captions",
        symbol="<caption>",
        settings=CaptionConfig,
        terms=(Term("caption", "labels"),),
        qualifies=_has_captions,
        task="dsmoe_vl.tasks.caption:CaptionTask",
        evaluation="dsmoe_vl.evaluation.captions:CaptionEvaluation",
        needs=("media", "caption"),
    ),
    TaskSpec(
        name="retrieval",
        title="Retrieval",
        symbol="<retrieval>",
        settings=RetrievalConfig,
        terms=(Term("retrieval", "pairs"),),
        qualifies=_has_two_sides,
        task="dsmoe_vl.tasks.retrieval:RetrievalTask",
        evaluation="dsmoe_vl.evaluation.retrieval:RetrievalEvaluation",
        head_shapes=_retrieval_heads,
        needs=("media", "caption"),
    ),
    TaskSpec(
        name="summary",
        title="Video summaries",
        symbol="<summary>",
        settings=SummaryConfig,
        terms=(
            Term("summary", "labels"),
            Term("importance", "frames", weight="importance_weight"),
            Term("ranking", "comparisons", weight="ranking_weight"),
        ),
        qualifies=_has_summary,
        task="dsmoe_vl.tasks.video_summary:VideoSummaryTask",
        evaluation="dsmoe_vl.evaluation.summaries:SummaryEvaluation",
        # One linear score of frames.
        head_shapes=lambda settings, width: {"importance.score.weight": (1, width), "importance.score.bias": (1,)},
        needs=("media", "summary"),
    ),
    TaskSpec(
        name="transcript",
        title="Transcripts",
        symbol="<transcript>",
        settings=TranscriptConfig,
        terms=(Term("transcript", "labels"),),
        qualifies=_has_transcript,
        task="dsmoe_vl.tasks.transcript:TranscriptTask",
        evaluation="dsmoe_vl.evaluation.transcripts:TranscriptEvaluation",
        hears=True,
        needs=("recording", "transcript"),
    ),
]


def register(spec: TaskSpec) -> None:
    """Add a task of another package. Call it before importing any other module of this package: the recipe's settings,
    the tokenizer's symbols and the counts of a batch are built from the table once, at import."""
    assert "dsmoe_vl.config.recipe" not in sys.modules, f"register {spec.name} before the recipe is imported"
    assert spec.name not in {known.name for known in TASKS}, f"two tasks are called {spec.name}"
    TASKS.insert(len(TASKS) if spec.hears else sum(not known.hears for known in TASKS), spec)


def import_class(path: str) -> Any:
    """Import and return the class that "module:class" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def task_number(name: str) -> int:
    """The index of a task in the table: its row in the router's task bias, and `Segment.task`."""
    return [spec.name for spec in TASKS].index(name)


def task_rows(hears: bool) -> int:
    """Tasks that the router of a model tells apart. One without a speech encoder has no row for the tasks that need
    one, so its weights are as they were before there were such tasks."""
    return sum(hears or not spec.hears for spec in TASKS)


def all_terms() -> tuple[Term, ...]:
    """The terms of all tasks, in the table's order."""
    return tuple(term for spec in TASKS for term in spec.terms)
