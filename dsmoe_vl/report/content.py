"""Data of an evaluation's report: small, collected during the evaluation, the same on any number of ranks.

Each task provides its own `TaskPart`; the page knows no task by name.

Shapes: N sparse layers, J tasks, M modalities, E experts of the widest layer, f sampled frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Thumbnail:
    """A small picture, a JPEG of `width` x `height` pixels."""

    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True)
class CaptionExample:
    """A picture, or some frames of a video, with its generated caption. `correct` None: the truth is unknown."""

    key: str
    pictures: list[Thumbnail]
    generated: str
    references: list[str]
    correct: bool | None


@dataclass(frozen=True)
class Candidate:
    """A result of a query: a text or picture, its cosine similarity, and whether it belongs to the query."""

    score: float
    right: bool
    text: str = ""
    picture: Thumbnail | None = None


@dataclass(frozen=True)
class RetrievalExample:
    """A query (text or picture) and its best candidates, the best one first.

    `right`: the best right candidate; `place`: its rank among all `gallery` candidates, from 1, as in the metrics.
    """

    direction: Literal["text_to_media", "media_to_text"]
    text: str
    picture: Thumbnail | None
    found: list[Candidate]
    right: Candidate
    place: int
    gallery: int


@dataclass(frozen=True)
class Storyboard:
    """A video with its importance. `seconds` and `importance` (0 to 1): [f]; `annotated` [parts]: mean over
    `annotators`, of equal parts of `duration_seconds`. `frames`: some frames by index, mostly key frames.
    """

    key: str
    seconds: np.ndarray
    importance: np.ndarray
    annotated: np.ndarray
    annotators: int
    duration_seconds: float
    frames: dict[int, Thumbnail]
    key_frames: list[int]
    generated: str
    reference: str
    scores: dict[str, float]


@dataclass(frozen=True)
class CaptionExamples:
    """Captions of one folder of shards, chosen at random. `wrong`: additional ones, all wrong."""

    random: list[CaptionExample] = field(default_factory=list)
    wrong: list[CaptionExample] = field(default_factory=list)


@dataclass(frozen=True)
class ScoreLabel:
    """Display name and format of a score.

    A "count" is a whole number, a "percent" a fraction that is shown times 100, "plain" has three decimals.
    """

    text: str
    unit: Literal["count", "percent", "plain"] = "plain"


@dataclass(frozen=True)
class Section:
    """A task's section of the page. `anchor`: its id. `template`: a Jinja2 template with the variable `folders`, a list
    of (short name, examples) of folders with examples; it may import `macros.html`."""

    anchor: str
    title: str
    template: Path


@dataclass(frozen=True)
class TaskPart:
    """One task's part of the page. `title`: of its scores; `labels`: by a score's name in eval.json; `examples`: by
    folder, in the form that the section's template reads."""

    title: str
    labels: Mapping[str, ScoreLabel]
    section: Section | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertLoad:
    """Assignments of tokens to experts, float64 [N, J, M, E]. `layers` [N]: the decoder layers' numbers, from 0;
    `experts` [N]: experts of each layer, columns beyond are 0."""

    load: np.ndarray
    layers: list[int]
    experts: list[int]


@dataclass(frozen=True)
class Report:
    """Everything on the page. `scores` by folder, task and metric, as in eval.json; `tasks` by task, in the order of
    their sections; `plan` is the run's plan.json; `step` the optimizer step of the weights."""

    run: str
    step: int
    scores: dict[str, dict[str, dict[str, float]]]
    tasks: dict[str, TaskPart]
    load: ExpertLoad | None
    plan: dict[str, Any]
