"""What a report of an evaluation shows, found where the evaluation happens: small, and the same on any number of ranks.

Shapes: N sparse layers, J tasks, M modalities, E experts of the widest layer, f frames that the model has seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
class FolderExamples:
    """Examples of one folder of shards. `wrong`: more captions, all of them wrong."""

    captions: list[CaptionExample] = field(default_factory=list)
    wrong: list[CaptionExample] = field(default_factory=list)
    retrieval: list[RetrievalExample] = field(default_factory=list)
    storyboards: list[Storyboard] = field(default_factory=list)


@dataclass(frozen=True)
class ExpertLoad:
    """Assignments of tokens to experts, float64 [N, J, M, E]. `layers` [N]: the decoder layers' numbers, from 0;
    `experts` [N]: how many they have, the columns beyond are empty."""

    load: np.ndarray
    layers: list[int]
    experts: list[int]


@dataclass(frozen=True)
class Report:
    """Everything on the page. `scores` by folder, task and metric, as in eval.json; `examples` by folder; `plan` is the
    run's plan.json; `step` the optimizer step of the weights."""

    run: str
    step: int
    scores: dict[str, dict[str, dict[str, float]]]
    examples: dict[str, FolderExamples]
    load: ExpertLoad | None
    plan: dict[str, Any]
