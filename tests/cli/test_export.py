"""`launch/export.py` on a trained run, as a user starts it."""

from __future__ import annotations

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.synthetic.scenes import scene
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from tests.support.runs import REPOSITORY, STEPS, TRAIN, finish, metrics, python, start

EXPORT, GENERATE = (REPOSITORY / "launch" / name for name in ("export.py", "generate.py"))


def test_an_exported_run_is_used_like_the_run(trained, tmp_path):
    result = finish(start(python(EXPORT, "--run", trained, "--output", tmp_path / "small")))
    assert (result.status, result.err) == (0, "")
    checkpoint = trained / "checkpoints" / f"step_{STEPS:08d}"
    size = WeightsFile(checkpoint).size_bytes
    assert result.out.splitlines() == [
        str(checkpoint),
        "  layer 1: 0 of 4 experts are null and dropped",
        f"  weights: {size:,} bytes before, {WeightsFile(tmp_path / 'small').size_bytes:,} bytes after",
        f"wrote {tmp_path / 'small'}",
    ]
    (tmp_path / "a.jpg").write_bytes(scene(np.random.default_rng(0), True, 48, 2)[0])
    captions = [
        finish(start(python(GENERATE, "caption", "--run", run, "--image", tmp_path / "a.jpg", "--max-tokens", 8)))
        for run in (trained, tmp_path / "small")
    ]
    assert captions[0].out == captions[1].out != "" and captions[1].status == 0


def test_the_l1_term_empties_experts_that_the_export_leaves_out(tiny, tmp_path):
    run = tiny.folder / "runs" / "l1"
    overrides = ["objective.l1.weight=20", "run.steps=16", "run.evaluate_every=0", "data.evaluation=[]"]
    result = finish(start(python(TRAIN, *tiny.arguments(run, *overrides))))
    assert result.status == 0, result.out + result.err
    lines = metrics(run)
    assert lines[0]["omega"] > 100 and lines[0]["zero_fraction_experts"] == 0
    assert lines[-1]["omega"] == 0 and lines[-1]["zero_fraction_experts"] == 1 > lines[-1]["zero_fraction"] > 0.05
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    names = {"omega", "zero_fraction", "zero_fraction_experts"}
    assert {f"sparsity/{name}" for name in names} <= set(board.Tags()["scalars"])
    result = finish(start(python(EXPORT, "--run", run, "--output", tmp_path / "small")))
    assert "  layer 1: 4 of 4 experts are null and dropped" in result.out.splitlines(), result.out + result.err


def test_what_cannot_be_exported(trained, tmp_path):
    for run, output, message in [
        (tmp_path / "none", tmp_path / "new", f"error: no complete checkpoint under {tmp_path / 'none'}"),
        (trained, tmp_path, f"error: output {tmp_path} is not empty"),
    ]:
        (tmp_path / "file").touch()
        result = finish(start(python(EXPORT, "--run", run, "--output", output)))
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith(message) and result.err.count("\n") == 1
