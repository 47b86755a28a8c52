"""What a report of an evaluation shows: small, gathered while the evaluation runs, the same on any number of ranks.

A task brings its own part, a `TaskPart`; the page knows no task by name.

Shapes: N sparse layers, J tasks, M modalities, E experts of the widest layer, f frames that the model has seen.
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
    """A picture, or some frames of a video, with what was generated for it. `correct` None: the truth is unknown."""

    key: str
    pictures: list[Thumbnail]
    generated: str
    references: list[str]
    correct: bool | None


@dataclass(frozen=True)
class Candidate:
    """What a query found: a text or a picture, its cosine with the query, and whether it belongs to the query."""

    score: float
    right: bool
    text: str = ""
    picture: Thumbnail | None = None


@dataclass(frozen=True)
class RetrievalExample:
    """A query, a text or a picture, and its best candidates, the best one first.

    `place`: that of the best right candidate among all `gallery` candidates, from 1, as the metrics count it.
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
    """A video as the model sees it. `seconds`, `importance` [f] in [0, 1]; `annotated` [parts]: the mean of the
    `annotators`, of equal parts of `duration_seconds`. `frames`: some frames by number, those of `key_frames` included.
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
    """Captions of one folder of shards, chosen at random. `wrong`: more of them, all wrong."""

    random: list[CaptionExample] = field(default_factory=list)
    wrong: list[CaptionExample] = field(default_factory=list)


@dataclass(frozen=True)
class ScoreLabel:
    """What a score is called on the page, and how it is written.

    A "count" is a whole number, a "percent" a fraction that is shown times 100, "plain" has three decimals.
    """

    text: str
    unit: Literal["count", "percent", "plain"] = "plain"


@dataclass(frozen=True)
class Section:
    """A task's section of the page. `anchor`: its id. `template`: a Jinja2 template that is given `folders`, a list of
    (short name, examples) of the folders that have any; it may import `macros.html`."""

    anchor: str
    title: str
    template: Path


@dataclass(frozen=True)
class TaskPart:
    """Everything that the page says of one task. `title`: of its scores; `labels`: by a score's name in eval.json;
    `examples`: by folder, in whatever form the section's template reads."""

    title: str
    labels: Mapping[str, ScoreLabel]
    section: Section | None = None
    examples: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertLoad:
    """Assignments of tokens to experts, float64 [N, J, M, E]. `layers` [N]: the decoder layers' numbers, from 0;
    `experts` [N]: how many they have, the columns beyond are empty."""

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
