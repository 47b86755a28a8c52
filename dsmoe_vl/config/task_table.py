"""The tasks that a model can learn, one row each. Whatever counts, names, lists, scores or draws tasks starts here.

A new task is a settings class, a row of `TASKS`, and the two classes that the row names. Without torch: the recipe, the
planner and the data tools read this table too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from dsmoe_vl.config.bounds import bounded

# What is counted as a term's targets in a segment: positions with a language-model target, retrieval pairs, frames with
# an importance, or compared pairs of frames. `data/pack.py` counts them.
Targets = Literal["labels", "pairs", "frames", "comparisons"]


@dataclass(frozen=True)
class CaptionConfig:
    """Captioning of images and videos."""

    weight: float = bounded(1.0, least=0)  # w_i; 0: the task is not learned
    # share of a caption's tokens that training hides from the words that follow them
    word_dropout: float = bounded(0.0, least=0, most=1)


@dataclass(frozen=True)
class RetrievalConfig:
    """Image-text and video-text retrieval."""

    weight: float = bounded(0.0, least=0)  # w_i; 0: the task is not learned
    loss: str = bounded("info_nce", choices=("info_nce", "sigmoid"))
    embedding_width: int = bounded(512, least=1)
    gradient_cache: bool = False  # contrast over all accumulation steps together, at the cost of a second forward


@dataclass(frozen=True)
class SummaryConfig:
    """Video summarization: the text, and how much each frame matters."""

    weight: float = bounded(0.0, least=0)  # w_i of the text; 0: the task is not learned
    importance_weight: float = bounded(1.0, least=0)  # of the regression to the annotators' mean
    ranking_weight: float = bounded(1.0, least=0)  # of the comparison of pairs of frames
    # difference in importance, 0 to 1, from which two frames are compared
    ranking_margin: float = bounded(0.1, least=0)


@dataclass(frozen=True)
class Term:
    """One term of a task's loss: `weight * sum / targets`. Its value is logged as `loss_NAME`."""

    name: str
    targets: Targets
    weight: str = "weight"  # the task's setting that weighs it


def _no_heads(settings: Any, width: int) -> int:
    return 0


@dataclass(frozen=True)
class TaskSpec:
    """One task. `settings` is the dataclass of its table [tasks.NAME] in a recipe; its field `weight` is 0 where the
    task is not learned."""

    name: str  # in recipes, in KEY.json's `tasks`, in metrics
    title: str  # for people, in the plural
    symbol: str  # the control symbol after which the task's text is generated
    settings: type[Any]
    terms: tuple[Term, ...]
    # Whether a sample can serve the task: its kind ("image" or "video"), its captions and its KEY.json.
    qualifies: Callable[[str, Sequence[str], Mapping[str, Any]], bool]
    task: str  # "module:class" of its `tasks.task.Task`
    evaluation: str  # "module:class" of its `evaluation.task_evaluation.TaskEvaluation`
    # Parameters of its heads, from its settings and the decoder's width.
    head_parameters: Callable[[Any, int], int] = field(default=_no_heads)


def _has_captions(kind: str, captions: Sequence[str], meta: Mapping[str, Any]) -> bool:
    return bool(captions)


def _has_summary(kind: str, captions: Sequence[str], meta: Mapping[str, Any]) -> bool:
    scored = meta.get("saliency") is not None or meta.get("importance") is not None
    return kind == "video" and (scored or bool(meta.get("summary")))


# A task's number is its place here: the row of the router's task bias. New tasks go to the end.
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
    ),
    TaskSpec(
        name="retrieval",
        title="Retrieval",
        symbol="<retrieval>",
        settings=RetrievalConfig,
        terms=(Term("retrieval", "pairs"),),
        qualifies=_has_captions,
        task="dsmoe_vl.tasks.retrieval:RetrievalTask",
        evaluation="dsmoe_vl.evaluation.retrieval:RetrievalEvaluation",
        # Two projections, a scale and a bias.
        head_parameters=lambda settings, width: 2 * width * settings.embedding_width + 2,
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
        head_parameters=lambda settings, width: width + 1,  # one linear score of frames
    ),
]


def register(spec: TaskSpec) -> None:
    """Add a task of another package. To be called before any other module of this one is imported: the recipe's
    settings, the tokenizer's symbols and the counts of a batch are made from the table once."""
    assert "dsmoe_vl.config.recipe" not in sys.modules, f"register {spec.name} before the recipe is imported"
    assert spec.name not in {known.name for known in TASKS}, f"two tasks are called {spec.name}"
    TASKS.append(spec)


def named(path: str) -> Any:
    """The class "module:class" of a row, imported now."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def task_number(name: str) -> int:
    """The number of a task of the table: its row of the router's task bias, and `Segment.task`."""
    return [spec.name for spec in TASKS].index(name)


def all_terms() -> tuple[Term, ...]:
    """The terms of all tasks, in the table's order."""
    return tuple(term for spec in TASKS for term in spec.terms)
