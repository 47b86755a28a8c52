"""A made-up report that holds everything a page can show, with texts that try to be HTML; and a reader of its tags."""

from __future__ import annotations

import dataclasses
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from dsmoe_vl.config.task_table import TASKS, import_class
from dsmoe_vl.report.content import (
    Candidate,
    CaptionExample,
    CaptionExamples,
    ExpertLoad,
    Report,
    RetrievalExample,
    Storyboard,
    TaskPart,
    Thumbnail,
)

ATTACK = '"><script>alert(1)</script><img src=http://a.b/c.png onerror=alert(2)> & \x00\ud800 </style></pre>'
FOLDERS = ("data/images_eval", "https://example.org/shards/videos_eval")
_VOID = {"meta", "link", "img", "br", "wbr"}


def made_up(attack: str = ATTACK, experts: int = 8) -> Report:
    """Two folders, one of images and one of videos; `attack` is part of every text."""
    rng = np.random.default_rng(0)

    def picture():
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(file, "JPEG", quality=80, optimize=True)
        return Thumbnail(file.getvalue(), 96, 64)

    def captioned(correct, frames):
        return CaptionExample(
            f"key {attack}", [picture() for _ in range(frames)], attack, [attack, "b", "c", "d"], correct
        )

    right = Candidate(0.25, True, attack)
    texts = [Candidate(0.9 - i / 10, False, f"{attack} {i}") for i in range(5)]
    media = [Candidate(0.9 - i / 10, i == 1, picture=picture() if i else None) for i in range(5)]
    retrieval = [
        RetrievalExample("text_to_media", attack, None, media, media[1], 2, 1000),
        RetrievalExample("media_to_text", "", picture(), texts, right, 17, 5000),
    ]
    seconds = np.arange(16, dtype=np.float32)
    board = Storyboard(
        key=attack,
        seconds=seconds,
        importance=rng.random(16, np.float32),
        annotated=rng.random(40, np.float32),
        annotators=20,
        duration_seconds=16.5,
        frames={number: picture() for number in (0, 3, 7, 9, 15)},
        key_frames=[3, 9],
        generated=attack,
        reference=attack,
        scores={"key_frame_f": 0.5, "kendall_tau": -0.25, "attribute_accuracy": 0.0},
    )
    captions = (
        CaptionExamples([captioned(True, 1), captioned(False, 1)], [captioned(False, 1)]),
        CaptionExamples([captioned(None, 4)]),
    )
    examples = {
        "caption": dict(zip(FOLDERS, captions, strict=True)),
        "retrieval": dict.fromkeys(FOLDERS, retrieval),
        "summary": {FOLDERS[0]: [], FOLDERS[1]: [board]},
        "transcript": {FOLDERS[0]: CaptionExamples([CaptionExample("spoken", [], attack, [attack], None)])},
    }
    tasks = {}
    for spec in TASKS:
        evaluation = import_class(spec.evaluation)
        tasks[spec.name] = TaskPart(spec.title, evaluation.labels, evaluation.section, examples[spec.name])
    scores = {
        FOLDERS[0]: {
            "caption": {"samples": 1200, "attribute_accuracy": 0.97166, "cider_d": 1.23456},
            "retrieval": {"samples": 200, "media_to_text_r1": 0.925, "coco_5k_text_to_media_median_rank": 3.0},
        },
        FOLDERS[1]: {
            "caption": {"samples": 100, attack: float("nan")},
            "summary": {"samples": 100, "kendall_tau": 0.8127, "importance_error": 0.0618},
        },
    }
    load = ExpertLoad(rng.integers(0, 1000, (3, 3, 3, experts)).astype(np.float64), [1, 2, 3], [experts] * 3)
    plan = {
        "recipe": {"model": {"width": 192}, "run": {"steps": 760}, "data": {"sources": [{"name": attack}]}},
        "parameters": {"total": 5144915, "active": 2490707, "experts": 3538944},
        "deepspeed": {"optimizer": {"type": "AdamW"}},
        "world_size": 2,
        "precision": attack,
    }
    return Report(f"run {attack}", 760, scores, tasks, load, plan)


def without(report: Report, **parts: object) -> Report:
    """The report with other parts."""
    return dataclasses.replace(report, **parts)  # type: ignore[arg-type]


class Page(HTMLParser):
    """All tags with their attributes, and the text of each kind of element; asserts that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []  # innermost element, text
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append((self._open[-1] if self._open else "", data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self, tag: str = "") -> str:
        """All text, or that of one kind of element, its white space as a browser shows it."""
        return " ".join(" ".join(text for name, text in self.text if tag in ("", name)).split())
