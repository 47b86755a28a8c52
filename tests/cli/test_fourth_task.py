"""A task that this repository does not know is trained, evaluated and reported by registering it, without a change."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from tests.conftest import REPOSITORY
from tests.support.reports import Page
from tests.support.runs import SHOWS_SAMPLES, finish, free_port, metrics, python, start, write_project

TASKS = ("tasks.counting.weight=1.0", "tasks.retrieval.weight=1.0")


def with_fourth_task(*arguments, ranks=0):
    command = python("-m", "tests.support.fourth_task", *arguments)
    if ranks:
        launcher = [command[0].replace("python", "deepspeed"), "--num_accelerators", str(ranks)]
        command = [*launcher, "--master_port", str(free_port()), "--module", "tests.support.fourth_task", *arguments]
    result = finish(start([str(part) for part in command]))
    assert result.status == 0, result.out + result.err
    return result.out


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Shards and a tokenizer made with the fourth task registered."""
    folder = tmp_path_factory.mktemp("four")
    counts = ("--images", 24, "--videos", 4, "--eval-images", 6, "--eval-videos", 2, "--size", 48)
    with_fourth_task("data_tools.synthetic", "--output", folder / "data", *counts)
    made = write_project(folder)
    with_fourth_task(
        "data_tools.tokenizer", "train", "--data", made.data / "images_train", "--output",
        made.data / "tokenizer.model", "--vocab-size", 320,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def run(project):
    run = project.folder / "runs" / "four"
    steps = ("run.steps=4", "run.checkpoint_every=4", "run.evaluate_every=4", SHOWS_SAMPLES)
    with_fourth_task("launch/train.py", *project.arguments(run, *steps, *TASKS), ranks=2)
    with_fourth_task("launch/evaluate.py", "--run", run, "--max-tokens", 4)
    return run


def test_converters_say_which_samples_serve_it(project):
    images = [sample.meta["tasks"] for sample in iterate_samples(SourceConfig.at(project.data / "images_eval"))]
    videos = [sample.meta["tasks"] for sample in iterate_samples(SourceConfig.at(project.data / "videos_eval"))]
    assert images == [["caption", "retrieval", "counting"]] * 6
    assert videos == [["caption", "retrieval", "summary"]] * 2


def test_its_terms_are_trained_logged_and_drawn(run):
    last = metrics(run)[-1]
    assert {"eval_loss_counting", "eval_loss_parity", "eval_loss_caption"} <= last.keys()
    lines = [line for line in metrics(run) if "loss_counting" in line]
    weighted = {"caption": 1.0, "retrieval": 1.0, "counting": 1.0, "parity": 0.5}
    for line in lines:
        terms = sum(weight * line[f"loss_{term}"] for term, weight in weighted.items())
        assert line["loss"] == pytest.approx(terms + 0.01 * line["balance_loss"] + 0.001 * line["z_loss"], rel=1e-5)
    plan = json.loads((run / "plan.json").read_text())
    assert plan["recipe"]["tasks"]["counting"] == {"weight": 1.0, "parity_weight": 0.5}
    assert plan["parameters"]["heads"] == 2 * 32 * 512 + 2 + 32 + 1
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {"train/loss_counting", "eval/loss_parity"} <= set(events.Tags()["scalars"])
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_its_scores_and_examples_are_reported(run):
    scores = json.loads((run / "eval.json").read_text())
    (images,) = (found for folder, found in scores.items() if folder.endswith("images_eval"))
    assert images["counting"]["samples"] == 6 and 0 <= images["counting"]["right"] <= 1
    page = Page((run / "report.html").read_text())
    assert [section["id"] for section in page.named("section")] == [
        "metrics", "captions", "retrieval", "counts", "routing", "plan",
    ]  # fmt: skip
    words = page.words()
    assert "right counts, %" in words and "images_eval-0000000: " in words
    assert "counts of objects" in words  # the experts' load by task


def test_the_parameters_are_those_of_the_plan(run):
    plan = json.loads((run / "plan.json").read_text())
    weights = WeightsFile(run / "checkpoints" / "step_00000004").load()
    counted = sum(value.numel() for value in weights.values())
    assert weights["layers.1.feed_forward.router.task_bias"].shape[0] == 4
    buffers = 4  # the selection bias of one sparse layer
    assert counted == plan["parameters"]["total"] + buffers
    assert REPOSITORY.is_dir()
