"""The monitor on rank 0: one bar on a terminal, lines in a file, warnings, samples that end no training; the clock."""

from __future__ import annotations

import io
import json
import math
import time
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoe_vl.config.parts import PARTS, part_of
from dsmoe_vl.config.recipe import DataConfig, Recipe, RunConfig, SourceConfig, TokenizerConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.monitor import run_log as monitoring
from dsmoe_vl.monitor.board import tag
from dsmoe_vl.monitor.metrics_file import MetricsFile
from dsmoe_vl.monitor.run_log import RunLog
from dsmoe_vl.parallel.device import memory_gib, peak_flops
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.training.clock import PhaseClock

VALUES = {
    "loss": 2.0, "loss_caption": 2.0, "lr": 1e-3, "grad_norm": 1.0, "grad_norm_vision": 0.6,
    "tokens_per_second": 1000.0, "step_ms": 100.0, "data_wait_ms": 1.0, "rss_gib": 1.0,
}  # fmt: skip


def plan(folder, **run):
    source = (SourceConfig("images", "shards"),)
    recipe = Recipe(
        data=DataConfig(sources=source, evaluation=source),
        tokenizer=TokenizerConfig("tokenizer.model"),
        run=RunConfig(steps=100, directory=str(folder), **run),
    )
    deepspeed = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    made = resolve(recipe, deepspeed, 1, device="cpu", bf16_unit=False)
    made.run_dir.mkdir(parents=True)
    return replace(made, tensorboard_enabled=True, tensorboard_dir=made.run_dir / "tensorboard")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("out", [Terminal, io.StringIO])
def test_a_bar_on_a_terminal_and_lines_in_a_file(out, tmp_path, monkeypatch):
    stdout, stderr = out(), Terminal()
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.stderr", stderr)
    monitor = RunLog(plan(tmp_path), 0, 0)
    monitor.advance()
    monitor.log(1, VALUES)
    monitor.close()
    assert "loss 2.0000, 1,000 tokens/s" in stderr.getvalue()
    assert ("step 1/100  loss 2.0000" in stdout.getvalue()) == (out is io.StringIO)


def test_other_ranks_write_and_say_nothing(tmp_path, capsys):
    monitor = RunLog(plan(tmp_path), 1, 0)
    monitor.advance()
    monitor.log(1, VALUES)
    monitor.log_samples(100)
    monitor.close()
    assert capsys.readouterr() == ("", "") and not list((tmp_path / "run").iterdir())


def test_a_warning_is_said_and_kept(tmp_path, capsys):
    made = plan(tmp_path)
    monitor = RunLog(made, 0, 0)
    monitor.log(7, {**VALUES, "loss_caption": math.nan})
    monitor.close()
    assert "warning at step 7: loss_caption not finite" in capsys.readouterr().out
    board = EventAccumulator(str(made.tensorboard_dir))
    board.Reload()
    assert "warnings/text_summary" in board.Tags()["tensors"]


def test_samples_are_drawn_now_and_then_and_at_the_end_and_end_no_training(tmp_path, capsys, monkeypatch):
    drawn = []

    def write(_folder, _recipe, _device, step):
        drawn.append(step)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(monitoring, "write_samples", write)
    monitor = RunLog(plan(tmp_path, samples_every=30), 0, 0)
    for step in range(20, 101, 20):
        monitor.log_samples(step)
    monitor.close()
    assert drawn == [40, 80, 100]
    assert "no samples at step 40: RuntimeError: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [(5,), (0, 3), (6, 5), (1, 2, 3)])
def test_a_trace_has_a_first_and_a_last_step(steps, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.profile_steps"):
        plan(tmp_path, profile_steps=steps)


def test_tags():
    assert [tag(name) for name in ("loss_caption", "grad_norm", "grad_norm_vision", "eval_loss", "images/errors")] == [
        "train/loss_caption", "train/grad_norm", "gradients/vision", "eval/loss", "data/images/errors",
    ]  # fmt: skip


def test_every_parameter_has_its_part():
    names = {
        "vision": ("backbone.vision.layers.0.attention.qkv.weight", "vision.prefix"),
        "connector": ("backbone.connector.up.weight", "connector.cell_norm.bias"),
        "speech": ("backbone.speech.conv1.weight", "speech.layers.0.attention.qkv.weight"),
        "embedding": ("backbone.embedding.weight",),
        "attention": ("backbone.layers.0.attention.q.weight", "backbone.layers.0.attention_norm.weight"),
        "feed_forward": (
            "backbone.layers.0.feed_forward.down.weight",
            "backbone.layers.1.feed_forward.shared.down.weight",
        ),
        "experts": (
            "backbone.layers.1.feed_forward.experts.w1",
            "backbone.layers.1.feed_forward.deepspeed_moe.experts.deepspeed_experts.0.w1",
        ),
        "router": ("backbone.layers.1.feed_forward.router.weight",),
        "heads": ("backbone.norm.weight", "backbone.retrieval.media.weight", "backbone.importance.score.weight"),
    }
    assert set(names) == set(PARTS)
    assert {name: part_of(name) for of_part in names.values() for name in of_part} == {
        name: part for part, of_part in names.items() for name in of_part
    }


def test_the_clock_adds_up_phases_and_begins_anew():
    clock = PhaseClock(torch.device("cpu"))
    for _ in range(2):
        with clock.phase("forward"):
            time.sleep(0.01)
    with clock.phase("backward"):
        pass
    found = clock.read()
    assert 0.02 <= found["forward"] < 5 and 0 <= found["backward"] < found["forward"]
    assert clock.read() == {}


def test_a_cpu_has_memory_and_no_known_peak():
    assert 0.05 < memory_gib(torch.device("cpu"))["rss_gib"] < 100
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_metrics_of_a_run_that_has_no_checkpoint_begin_anew(tmp_path):
    """At step 0 the held-out losses are logged again; a run that goes on keeps its lines up to the checkpoint."""
    file = tmp_path / "metrics.jsonl"
    for first, kept in ((1, [0, 1]), (0, [])):
        file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2)))
        MetricsFile(file, first).close()
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == kept
