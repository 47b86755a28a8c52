"""Training through `deepspeed launch/train.py`: what a run leaves behind, and what a dry run says."""

from __future__ import annotations

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoe_vl.checkpoint.store import read_manifest
from tests.support.runs import REPOSITORY, STEPS, TRAIN, finish, metrics, python, start


def split_lines(run):
    """Lines of training steps, and of evaluations."""
    lines = metrics(run)
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss_caption" in line]


def test_every_step_is_logged_with_finite_values(trained):
    steps, evaluations = split_lines(trained)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for line in steps + evaluations for value in line.values())
    wanted = {"loss", "loss_caption", "lr", "grad_norm", "tokens_per_second", "max_violation", "real_tokens"}
    assert all(wanted <= line.keys() for line in steps)
    assert steps[-1]["loss_caption"] < 0.8 * steps[0]["loss_caption"]


def test_held_out_loss_is_taken_and_falls(trained):
    _, evaluations = split_lines(trained)
    assert [line["step"] for line in evaluations] == [0, STEPS // 2, STEPS]
    names = {"eval_loss", "eval_loss_caption", "eval_loss_caption_images", "eval_loss_caption_videos"}
    assert all(line.keys() == {"step", *names} for line in evaluations)
    assert evaluations[-1]["eval_loss_caption"] < 0.8 * evaluations[0]["eval_loss_caption"]


def test_packs_are_nearly_full(trained):
    steps, _ = split_lines(trained)
    assert sum(line["real_tokens"] for line in steps) / STEPS >= 0.97


def test_samples_are_counted_over_both_ranks(trained):
    last = split_lines(trained)[0][-1]
    assert last["images/errors"] == last["videos/errors"] == 0
    assert last["images/samples"] == pytest.approx(2 * last["videos/samples"], rel=0.1)  # their weights
    first = split_lines(trained)[0][0]
    assert first["images/samples"] + first["videos/samples"] > 2 * 16  # each rank filled a pack, and looked ahead


def test_a_source_that_begins_anew_says_so(trained, tiny):
    """Once an epoch, whichever rank is first to begin it."""
    steps, _ = split_lines(trained)
    said = (tiny.folder / "trained.out").read_text().splitlines()
    for source, size in (("images", 40), ("videos", 8)):
        epochs = [line[f"{source}/epoch"] for line in steps]
        assert epochs == sorted(epochs)
        assert epochs[-1] == pytest.approx(steps[-1][f"{source}/samples"] / size, abs=1.5)
        assert [line for line in said if line.startswith(f"source {source} ")] == [
            f"source {source} begins epoch {epoch}: its samples occur again" for epoch in sorted(set(epochs) - {0})
        ]


def test_tensorboard_holds_the_same_scalars(trained):
    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    steps, evaluations = split_lines(trained)
    for tag, name, lines in [
        ("train/loss", "loss", steps),
        ("train/loss_caption", "loss_caption", steps),
        ("train/lr", "lr", steps),
        ("train/grad_norm", "grad_norm", steps),
        ("moe/balance_loss", "balance_loss", steps),
        ("perf/tokens_per_second", "tokens_per_second", steps),
        ("data/images/samples", "images/samples", steps),
        ("eval/loss_caption", "eval_loss_caption", evaluations),
    ]:
        events = board.Scalars(tag)
        assert [event.step for event in events] == [line["step"] for line in lines]
        assert [event.value for event in events] == pytest.approx([line[name] for line in lines], rel=1e-6)
    assert "plan/text_summary" in board.Tags()["tensors"]


def test_run_directory(trained, tiny):
    plan = json.loads((trained / "plan.json").read_text())
    assert (plan["world_size"], plan["ep_size"], plan["zero_stage"]) == (2, 2, 2)
    checkpoints = trained / "checkpoints"
    newest = f"step_{STEPS:08d}"
    assert (checkpoints / "latest").read_text() == newest + "\n"
    assert sorted(folder.name for folder in checkpoints.glob("step_*")) == [f"step_{n:08d}" for n in (8, 16, 24)]
    manifest = read_manifest(checkpoints / newest)
    assert manifest is not None and manifest.step == STEPS
    assert {
        "model-00002-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
        "data.json",
        "trainer.json",
    } <= manifest.files.keys()
    assert (checkpoints / newest / "tokenizer.model").read_bytes() == (tiny.data / "tokenizer.model").read_bytes()
    assert not list(trained.glob("quarantine*"))


@pytest.mark.parametrize(
    ("recipe", "config", "ranks"),
    [("quickstart", "moe", 2), ("base", "moe", 8), ("large", "moe_zero3", 64)],
)
def test_dry_run_of_the_shipped_recipes(recipe, config, ranks, tmp_path):
    result = finish(
        start(
            python(TRAIN, "--dry-run", "--world-size", ranks, "--run-dir", tmp_path / "run",
                   "--recipe", REPOSITORY / "launch" / "recipes" / f"{recipe}.toml",
                   "--deepspeed", REPOSITORY / "ds_configs" / f"{config}.json")
        )
    )  # fmt: skip
    assert (result.status, result.err) == (0, ""), result.err
    assert f"{ranks} ranks" in result.out
    assert not (tmp_path / "run").exists()


def test_dry_run_names_what_is_not_here(tiny, tmp_path):
    def dry_run(*more):
        return finish(start(python(TRAIN, "--dry-run", *tiny.arguments(tmp_path / "run", *more))))

    assert "not here yet" not in dry_run().out
    lost = dry_run('data.evaluation=[{name="held", path="no/shards"}]', "tokenizer.path=no/tokenizer.model")
    assert lost.status == 0
    assert lost.out.splitlines()[-2:] == [
        "not here yet: data.evaluation, held: no/shards",
        "not here yet: tokenizer.path: no/tokenizer.model",
    ]
    small = dry_run("tokenizer.vocab_size=300")
    assert (small.status, len(small.err.splitlines())) == (2, 1) and "tokenizer.vocab_size = 300" in small.err
