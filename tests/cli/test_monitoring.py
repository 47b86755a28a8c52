"""What a user sees of a training: TensorBoard, the routers' recorder, a profiler's trace."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from dsmoe_vl.config.parts import PARTS
from dsmoe_vl.monitor.router_series import RouterSeries
from tests.support.runs import SHOWS_SAMPLES, STEPS, finish, metrics, python, start, two_ranks

TOP_K = 2


@pytest.fixture(scope="module")
def board(trained):
    found = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def recomputed(tiny):
    """A run on ZeRO-3 that recomputes activations, held up at step 6 and continued to step 8, profiled in between."""
    config = json.loads(tiny.deepspeed(3).read_text())
    config |= {"activation_checkpointing": {"partition_activations": False}, "gradient_accumulation_steps": 2}
    path = tiny.folder / "recomputed.json"
    path.write_text(json.dumps(config))
    run = tiny.folder / "runs" / "recomputed"
    arguments = ["--deepspeed", str(path), "--recipe", str(tiny.recipe), "--run-dir", str(run)]
    settings = [
        SHOWS_SAMPLES,
        "run.router_every=4",
        "run.profile_steps=[3,4]",
        "run.evaluate_every=2",
        "run.checkpoint_every=100",
    ]
    for steps in (6, 8):
        result = two_ranks([*arguments, *settings, f"run.steps={steps}"])
        assert result.status == 0, result.out + result.err
    return run


def lines_of_steps(run):
    return [line for line in metrics(run) if "loss" in line]


def tokens_of(run, first, last):
    """Real tokens of some steps, by the metrics."""
    per_step = json.loads((run / "plan.json").read_text())["tokens_per_step"]
    return sum(round(line["real_tokens"] * per_step) for line in lines_of_steps(run) if first <= line["step"] <= last)


@pytest.mark.parametrize("name", ["trained", "recomputed"])
def test_every_assignment_is_recorded_once(name, request):
    """Neither evaluation, nor recomputation, nor a second start adds or loses any."""
    run = request.getfixturevalue(name)
    series = RouterSeries.load_from(run / "router.npz")
    assert series.step.tolist() == ([8, 16, 24] if name == "trained" else [4, 6, 8])
    for index, (last, steps) in enumerate(zip(series.step, series.steps, strict=True)):
        tokens = tokens_of(run, last - steps + 1, last)
        assert series.tokens[index].sum() == tokens
        assert (series.load[index].sum((1, 2, 3)) + series.dropped[index] == TOP_K * tokens).all()
        assert (series.load[index].sum((1, 3)) == TOP_K * series.tokens[index]).all()  # by modality
        assert np.array_equal(series.gates[index].sum(-1), series.load[index].sum((1, 2, 3)))


@pytest.mark.parametrize("name", ["trained", "recomputed"])
def test_norms_of_the_parts_make_the_whole(name, request):
    for line in lines_of_steps(request.getfixturevalue(name)):
        parts = [value for key, value in line.items() if key.startswith("grad_norm_")]  # it does not hear
        assert len(parts) == len(PARTS) - 1 and math.hypot(*parts) == pytest.approx(line["grad_norm"], rel=1e-4)


def test_phases_lie_in_a_step(trained):
    for line in lines_of_steps(trained):
        phases = [line[f"{phase}_ms"] for phase in ("data_wait", "forward", "backward", "optimizer")]
        assert min(phases) > 0 and sum(phases) <= line["step_ms"]  # how much of it they fill depends on the machine
        assert 0.1 < line["rss_gib"] < 10


def test_tags_that_answer_the_first_questions(board):
    wanted = {
        "train/grad_norm", "gradients/vision", "gradients/experts", "gradients/router", "perf/forward_ms",
        "perf/backward_ms", "perf/optimizer_ms", "perf/data_wait_ms", "memory/rss_gib", "moe/max_violation_micro",
        "moe/layer_01/entropy", "moe/layer_01/max_violation", "moe/layer_01/dead_fraction", "data/real_tokens",
    }  # fmt: skip
    assert wanted <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("moe/layer_01/entropy")] == [8, 16, 24]
    assert board.Scalars("moe/layer_01/entropy")[-1].value == pytest.approx(1.0, abs=0.4)  # of ln 4 at most


def test_layout_names_only_tags_that_exist(board):
    layout = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        "is it learning", "is it fast", "are the experts alive", "how is the data",
    ]  # fmt: skip
    tags = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    plain = {tag for tag in tags if not set(tag) & set("*\\")}
    assert plain <= set(board.Tags()["scalars"])


def test_settings_can_be_compared(board):
    content = board.PluginTagToContent("hparams")
    begun = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert begun.hparams["moe.top_k"].number_value == TOP_K and begun.hparams["moe.routing"].string_value == "token"


def test_heat_maps(board, trained, tmp_path):
    images = board.Images("moe/load")
    assert [image.step for image in images] == [8, 16, 24]
    assert images[-1].width > 250
    result = finish(start(python("-m", "dsmoe_vl.monitor.router", trained, "--output", tmp_path / "router.png")))
    assert (result.status, result.err) == (0, ""), result.err
    with Image.open(tmp_path / "router.png") as picture:
        assert picture.width > 250
    failed = finish(start(python("-m", "dsmoe_vl.monitor.router", tmp_path)))
    assert failed.status == 2 and failed.err.startswith("error: ") and "run.router_every" in failed.err


def test_held_out_samples_are_shown(board, trained):
    """At the end of any run, and so at its one moment here: fewer steps than run.samples_every."""
    lines = (trained / "samples" / f"step_{STEPS:08d}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["source"] for record in records] == ["images", "videos"] * 4
    assert all(record["reference"] and "caption" in record for record in records)
    # Evaluations of the same run leave other pictures there.
    assert sorted(path.name for path in (trained / "samples").glob("step_*")) == [
        f"step_{STEPS:08d}.jsonl", f"step_{STEPS:08d}.png",
    ]  # fmt: skip
    assert [image.step for image in board.Images("samples")] == [STEPS]


def test_a_continued_run_has_every_step_once_on_the_board(recomputed):
    found = EventAccumulator(str(recomputed / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 9))
    assert [image.step for image in found.Images("moe/load")] == [4, 6, 8]


def test_the_trace_names_the_phases_of_a_sparse_layer(recomputed):
    with gzip.open(recomputed / "trace_step3_rank0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"moe/route", "moe/dispatch", "moe/all_to_all", "moe/experts", "moe/combine"} <= names
    assert len(list(recomputed.glob("trace_*"))) == 1


def test_only_rank_0_speaks(tiny, trained):
    said = (tiny.folder / "trained.out").read_text().splitlines()
    assert len([line for line in said if line.startswith(f"step {STEPS}/{STEPS}  loss")]) == 1
