"""Metrics that also go to other programs, through DeepSpeed's monitors."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec

import pytest

from tests.support.runs import TRAIN, finish, metrics, python, start


def trained(tiny, folder, *more, **environment):
    """A run of eight steps whose JSON has these sections."""
    config = json.loads(tiny.deepspeed().read_text())
    sections = {name: {"enabled": True, **settings} for name, settings in more}
    (folder / "mirrored.json").write_text(json.dumps({**config, **sections}))
    run = folder / "run"
    arguments = [*tiny.arguments(run, "run.steps=8", "run.log_every=4"), "--deepspeed", folder / "mirrored.json"]
    return run, finish(start(python(TRAIN, *arguments), **environment))


def test_csv_files_have_the_metrics(tiny, tmp_path):
    run, result = trained(tiny, tmp_path, ("csv_monitor", {}))
    assert result.status == 0, result.out + result.err
    lines = metrics(run)
    for name, file in (
        ("loss", "train_loss"),
        ("tokens_per_second", "perf_tokens_per_second"),
        ("eval_loss", "eval_loss"),
    ):
        with (run / "csv" / f"{file}.csv").open() as rows:
            head, *found = csv.reader(rows)
        wanted = [[line["step"], line[name]] for line in lines if name in line]
        assert head == ["step", file.rpartition("_")[2] if name == "loss" else name.removeprefix("eval_")]
        assert wanted and [int(step) for step, _ in found] == [step for step, _ in wanted]
        assert [float(value) for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)


def test_a_mirror_that_breaks_does_not_stop_training(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "csv").mkdir()
    (tmp_path / "run" / "csv" / "train_loss.csv").mkdir()  # no file can be written there
    run, result = trained(tiny, tmp_path, ("csv_monitor", {}))
    assert result.status == 0, result.out + result.err
    assert result.out.count("warning: no more metrics go to csv_monitor: IsADirectoryError") == 1
    assert [line["step"] for line in metrics(run) if "loss" in line] == [4, 8]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed: its absence was not tried")
def test_a_package_that_is_not_there_is_named(tiny, tmp_path):
    run, result = trained(tiny, tmp_path, ("wandb", {"project": "p"}))
    assert result.status == 2 and not run.exists()
    assert "wandb.enabled = true in the DeepSpeed JSON, but wandb is not installed: `pip install wandb`" in result.err


def test_a_key_of_an_account_is_refused(tiny, tmp_path):
    _, result = trained(tiny, tmp_path, ("comet", {"api_key": "secret"}))
    assert result.status == 2 and "comet.api_key" in result.err and "COMET_API_KEY" in result.err


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: what it writes offline was not read")
def test_wandb_offline(tiny, tmp_path):
    """It has no reader of its own files: the values stand in them as text."""
    run, result = trained(tiny, tmp_path, ("wandb", {"project": "p"}), ("csv_monitor", {}), WANDB_MODE="offline")
    assert result.status == 0 and "no more metrics" not in result.out, result.out + result.err
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    with (run / "csv" / "train_loss.csv").open() as rows:
        values = [value.encode() for _, value in list(csv.reader(rows))[1:]]
    assert b"train/loss" in written and len(values) == 2 and all(value in written for value in values)
    assert any(file.parent.glob("files/media/images/**/*.png"))
