"""What a model is asked about held-out samples, and the sheet that shows it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dsmoe_vl.config.recipe import DataConfig, Recipe, SourceConfig, TasksConfig
from dsmoe_vl.config.task_table import RetrievalConfig, SummaryConfig
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.drawing.sample_sheet import Curves, Row, draw
from dsmoe_vl.errors import DataError
from dsmoe_vl.inference.summarize import VideoSummary
from dsmoe_vl.monitor import samples
from tests.support.tars import write_tar

TASKS = TasksConfig(retrieval=RetrievalConfig(weight=1.0), summary=SummaryConfig(weight=1.0))


@pytest.fixture
def recipe(tiny):
    sources = tuple(SourceConfig(name, str(tiny.data / f"{name}_eval")) for name in ("images", "videos"))
    return Recipe(data=DataConfig(evaluation=sources), tasks=TASKS)


@pytest.fixture
def model(monkeypatch):
    """Answers at once; the embedding of a sample is a unit vector by its key, that of a text one by its length."""

    def unit(seeds):
        vectors = np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def summary(_, given, __):
        if given[0].media_type != "mp4":
            raise DataError("no video")
        return [VideoSummary("moves", np.array([0.0, 0.5], np.float32), np.array([0.1, 0.9], np.float32))]

    monkeypatch.setattr(samples, "caption", lambda _, given, __: [f"a picture of {given[0].key}"])
    monkeypatch.setattr(samples, "summarize", summary)
    monkeypatch.setattr(samples, "embed_media", lambda _, given: unit([abs(hash(one.key)) % 1000 for one in given]))
    monkeypatch.setattr(samples, "embed_texts", lambda _, texts: unit([len(text) for text in texts]))
    return SimpleNamespace()


def test_images_and_videos_in_turn_with_every_answer(recipe, model):
    answers = samples.ask(model, recipe, 60)
    assert [answer.sample.source.name for answer in answers] == ["images", "videos"] * 4
    for answer in answers:
        record = json.loads(json.dumps(answer.record()))
        assert record["caption"] == f"a picture of {answer.sample.key}" and record["reference"]
        assert 1 <= record["rank"] <= record["gallery"] == 12 and len(record["found"]) == 5
        assert ("importance" in record) == ("annotated_importance" in record) == (answer.sample.source.name == "videos")


def test_no_time_no_answers_but_the_samples(recipe, model):
    answers = samples.ask(model, recipe, -1.0)
    assert len(answers) == samples.SHOWN
    assert all(answer.caption is None and answer.rank is None for answer in answers)


def test_bad_samples_are_passed_over_and_the_first_is_named(recipe, model, tmp_path, capsys):
    """A malformed KEY.json does not hide the rest of its source, and a broken picture is said to be one."""
    (good,) = (next(iterate_samples(source)) for source in recipe.data.evaluation[:1])
    members = [("a.jpg", good.media), ("a.json", b"{"), ("b.jpg", b"no picture"), ("b.txt", b"b")]
    for key in ("c", "d"):
        members += [(f"{key}.{good.media_type}", good.media), (f"{key}.txt", b"a text")]
    write_tar(tmp_path / "00000.tar", members)
    recipe = Recipe(data=DataConfig(evaluation=(SourceConfig("mine", str(tmp_path)),)), tasks=TASKS)
    assert [answer.sample.key for answer in samples.ask(model, recipe, 60)] == ["c", "d"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("samples: 2 held-out samples are bad and not shown; the first is mine, 00000.tar, number 0:")


def test_files_are_written_and_randomness_is_left_alone(recipe, model, monkeypatch, tmp_path):
    def load(*_):
        torch.rand(3)
        return model

    monkeypatch.setattr(samples, "load_run", load)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    picture = samples.write_samples(tmp_path, recipe, "cpu", 40)
    assert torch.equal(torch.get_rng_state(), before)
    lines = (tmp_path / "samples" / "step_00000040.jsonl").read_text().splitlines()
    assert len(lines) == samples.SHOWN and picture is not None
    with Image.open(tmp_path / "samples" / "step_00000040.png") as written:
        assert written.size == picture.size


def test_a_sheet_keeps_within_its_width_whatever_the_texts_are():
    curves = Curves(np.array([0.0, 1.0]), np.array([0.0, 2.0]), np.array([0.5, np.float32(0.1)]))
    texts = [("caption", "word " * 300), ("summary", "x" * 5000), ("reference", "")]
    hits = [(Image.new("RGB", size), size == (64, 64)) for size in ((64, 64), (1, 3000), (3000, 1), (64, 48), (48, 64))]
    rows = [Row("name", [Image.new("RGB", size)], texts, hits, curves) for size in ((1, 3000), (3000, 1), (64, 64))]
    sheet = draw("title", [*rows, Row("frames", [Image.new("L", (9, 9))] * 4, [], [], None)])
    assert sheet.width < 1100 and 400 < sheet.height < 1500
    assert np.asarray(sheet)[:, -8:].min() == 255  # nothing is cut at the right
