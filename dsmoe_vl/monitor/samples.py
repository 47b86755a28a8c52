"""Runs the model on a few held-out pictures, videos and recordings during training.

The model is read from the checkpoint just written. Its weights file does not depend on the topology, so rank 0 needs no
collective. The other ranks wait at the next one, for at most `_SECONDS` plus one answer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dsmoe_vl.checkpoint.store import require_newest
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.recipe import Recipe, SourceConfig, learned_tasks
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.decode import pictures_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.drawing.picture_file import save_picture
from dsmoe_vl.drawing.sample_sheet import Curves, Row, draw
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import write_atomically
from dsmoe_vl.inference.embed import embed_media, embed_texts
from dsmoe_vl.inference.generate import caption, transcribe
from dsmoe_vl.inference.load import TrainedModel, load_run
from dsmoe_vl.inference.summarize import VideoSummary, summarize
from dsmoe_vl.metrics.retrieval import rank_of
from dsmoe_vl.tasks.video_summary import importance_at

SHOWN = 8  # samples, over all held-out sources
_GALLERY = 32  # pictures that a text query searches
_TOKENS = 48  # per generated text
_SECONDS = 60.0
_FRAMES = 4  # drawn per video
_HITS = 5  # shown per query


@dataclass(frozen=True)
class Answer:
    """Outputs for one sample; None if the model has not learned the task or time ran out."""

    sample: Sample
    caption: str | None = None
    rank: int | None = None  # of the sample's picture for its first caption, 1 is best
    gallery: int = 0
    found: tuple[Sample, ...] = ()  # the nearest samples, best first
    summary: VideoSummary | None = None
    transcript: str | None = None  # of its recording
    truth: np.ndarray | None = None  # annotated importance of the summary's frames

    def record(self) -> dict[str, Any]:
        """The values of a JSON line."""
        values: dict[str, Any] = {"key": self.sample.key, "source": self.sample.source.name}
        values["reference"] = _reference(self.sample)
        if self.caption is not None:
            values["caption"] = self.caption
        if self.transcript is not None:
            values |= {"said": contents_of(self.sample).transcript, "transcript": self.transcript}
        if self.rank is not None:
            values |= {"rank": self.rank, "gallery": self.gallery, "found": [sample.key for sample in self.found]}
        if self.summary is not None and self.truth is not None:
            values["summary"] = self.summary.text
            for name, numbers in (("seconds", self.summary.seconds), ("importance", self.summary.importance)):
                values[name] = [round(float(number), 4) for number in numbers]
            values["annotated_importance"] = [round(float(number), 4) for number in self.truth]
        return values


def write_samples(run_dir: Path, recipe: Recipe, device: str, step: int) -> Image.Image | None:
    """Write `samples/step_XXXXXXXX.png` and `.jsonl` of a run. Returns the picture, or None without held-out samples.

    Restores torch's random state, so that samples do not change the training steps.
    """
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        answers = ask(load_run(run_dir, _place(run_dir, device)), recipe, _SECONDS)
    if not answers:
        return None
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(answer.record(), ensure_ascii=False) + "\n" for answer in answers]
    write_atomically(folder / f"step_{step:08d}.jsonl", "".join(lines))
    picture = draw(f"held-out samples at step {step}", [_row(answer) for answer in answers])
    save_picture(picture, folder / f"step_{step:08d}.png")
    return picture


def ask(trained: TrainedModel, recipe: Recipe, seconds: float) -> list[Answer]:
    """Answers for the first SHOWN readable held-out samples, as many as fit into the time. The others are passed over,
    counted, and the first is named in a line of standard error."""
    end, bad = time.monotonic() + seconds, list[str]()
    tasks = {spec.name for spec in learned_tasks(recipe)}
    samples = list(islice(held_out(recipe, bad), _GALLERY))
    gallery = [sample for sample in samples if _pictures(sample, bad)]
    if bad:
        print(f"samples: {len(bad)} held-out samples are bad and not shown; the first is {bad[0]}", file=sys.stderr)
    heard = {_name(s) for s in samples if "transcript" in tasks and not contents_of(s).no_transcript}
    shown = {_name(sample) for sample in gallery} | heard
    answers = [Answer(sample) for sample in samples if _name(sample) in shown][:SHOWN]
    steps: list[Callable[[TrainedModel, Answer], Answer]] = []
    if "caption" in tasks:
        steps.append(_with_caption)
    if "summary" in tasks:
        steps.append(_with_summary)
    if heard:
        steps.append(_with_transcript)
    if "retrieval" in tasks and gallery:
        answers = _with_hits(trained, answers, gallery, end)
    for step in steps:
        for index, answer in enumerate(answers):
            if time.monotonic() > end:
                return answers
            try:
                answers[index] = step(trained, answer)
            except DataError:
                continue
    return answers


def held_out(recipe: Recipe, bad: list[str]) -> Iterator[Sample]:
    """The readable samples of all held-out sources in turn, always in the same order. Names of others go to `bad`."""

    def opened(source: SourceConfig) -> Iterator[Sample]:
        def failed(shard: str, number: int, error: DataError) -> None:
            bad.append(f"{source.name}, {shard}, number {number}: {error}")

        return iterate_samples(source, data=recipe.data, failed=failed)

    streams = [opened(source) for source in recipe.data.evaluation]
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)
            except DataError as error:  # no folder of shards any more
                bad.append(str(error))
                streams.remove(stream)


def _with_caption(trained: TrainedModel, answer: Answer) -> Answer:
    return replace(answer, caption=caption(trained, [answer.sample], _TOKENS)[0])


def _with_transcript(trained: TrainedModel, answer: Answer) -> Answer:
    return replace(answer, transcript=transcribe(trained, [answer.sample], _TOKENS)[0])


def _with_summary(trained: TrainedModel, answer: Answer) -> Answer:
    importance_at(answer.sample, [0.0])  # DataError if it is not an annotated video
    (summary,) = summarize(trained, [answer.sample], _TOKENS)
    truth = importance_at(answer.sample, [float(second) for second in summary.seconds])
    return replace(answer, summary=summary, truth=truth)


def _with_hits(trained: TrainedModel, answers: list[Answer], gallery: list[Sample], end: float) -> list[Answer]:
    """Add the rank of each sample's picture for its text; the gallery is cut off when time runs out."""
    vectors, kept = [], []
    for sample in gallery:
        if time.monotonic() > end:
            break
        try:
            vectors.append(embed_media(trained, [sample])[0])
            kept.append(sample)
        except DataError:
            continue
    places = {_name(sample): place for place, sample in enumerate(kept)}
    asked = [answer for answer in answers if _name(answer.sample) in places and _reference(answer.sample)]
    if not asked:
        return answers
    texts = embed_texts(trained, [_reference(answer.sample) for answer in asked])
    hits: dict[tuple[str, str], dict[str, Any]] = {
        _name(answer.sample): {
            "rank": rank_of(scores, np.arange(len(kept)) == places[_name(answer.sample)]),
            "gallery": len(kept),
            "found": tuple(kept[index] for index in (-scores).argsort(kind="stable")[:_HITS]),
        }
        for answer, scores in zip(asked, texts @ np.stack(vectors).T, strict=True)
    }
    return [replace(answer, **hits.get(_name(answer.sample), {})) for answer in answers]


def _name(sample: Sample) -> tuple[str, str]:
    return sample.source.name, sample.key


def _row(answer: Answer) -> Row:
    texts = [("reference", _reference(answer.sample))]
    if answer.caption is not None:
        texts.append(("caption", answer.caption))
    if answer.transcript is not None:
        texts += [("said", contents_of(answer.sample).transcript), ("transcript", answer.transcript)]
    if answer.summary is not None:
        texts.append(("summary", answer.summary.text))
    if answer.rank is not None:
        texts.append(("retrieval", f"rank {answer.rank} of {answer.gallery} for the reference; the nearest:"))
    curves = None
    if answer.summary is not None and answer.truth is not None:
        curves = Curves(answer.summary.seconds, answer.summary.importance, answer.truth)
    hits = [(_pictures(sample)[0], _name(sample) == _name(answer.sample)) for sample in answer.found]
    return Row(f"{answer.sample.source.name}  {answer.sample.key}", _pictures(answer.sample), texts, hits, curves)


def _pictures(sample: Sample, bad: list[str] | None = None) -> list[Image.Image]:
    """The picture, or a few frames; empty if there are none, or if they are unreadable: then the name goes to `bad`."""
    try:
        return [Image.fromarray(pixels) for pixels in pictures_of(sample, _FRAMES, enough_pixels=256 * 256)]
    except DataError as error:
        if bad is not None and sample.media is not None:
            bad.append(f"{sample.source.name}, {sample.key}: {error}")
        return []


def _reference(sample: Sample) -> str:
    return next(iter(contents_of(sample).captions), "")


def _place(run_dir: Path, device: str) -> str:
    """The accelerator if its free memory is more than twice the weights, else the CPU."""
    if device != "cuda":
        return "cpu"
    checkpoint, _ = require_newest(run_dir)
    needed = 2 * WeightsFile(checkpoint).size_bytes
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.mem_get_info()[0] > needed else "cpu"
