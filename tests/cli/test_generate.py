"""`launch/generate.py` and `launch/evaluate.py` on a trained run, as a user starts them."""

from __future__ import annotations

import json

import numpy as np

from data_tools.films import film
from data_tools.scenes import scene
from tests.runs import REPOSITORY, finish, python, start

GENERATE, EVALUATE = (REPOSITORY / "launch" / name for name in ("generate.py", "evaluate.py"))


def test_captions_of_files_and_one_that_is_no_image(trained, tmp_path):
    (tmp_path / "a.jpg").write_bytes(scene(np.random.default_rng(0), True, 48, 2)[0])
    (tmp_path / "b.mp4").write_bytes(film(np.random.default_rng(1), True, 48, 2)[0])
    (tmp_path / "bad.jpg").write_text("no image")
    images = [tmp_path / "bad.jpg", tmp_path / "a.jpg", tmp_path / "missing.jpg"]
    command = ["caption", "--run", trained, "--image", *images, "--video", tmp_path / "b.mp4", "--max-tokens", 8]
    result = finish(start(python(GENERATE, *command)))
    assert result.status == 2
    captioned = [line.split("\t") for line in result.out.splitlines()]
    assert [line[0] for line in captioned] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.mp4")]
    assert all(len(line) == 2 for line in captioned)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "bad.jpg: image cannot be decoded" in errors[0] and "missing.jpg" in errors[1]
    assert "Traceback" not in result.err


def test_a_run_that_is_not_there(tmp_path):
    result = finish(start(python(GENERATE, "caption", "--run", tmp_path / "none", "--image", "a.jpg")))
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: no complete checkpoint under") and result.err.count("\n") == 1


def test_evaluation_counts_right_captions(trained, tiny):
    result = finish(start(python(EVALUATE, "--run", trained, "--max-tokens", 8)))
    assert result.status == 0, result.err
    scores = json.loads((trained / "eval.json").read_text())
    assert {name: score["caption"]["samples"] for name, score in scores.items()} == {
        str(tiny.data / "images_eval"): 8,
        str(tiny.data / "videos_eval"): 4,
    }
    assert all(0 <= score["caption"]["attribute_accuracy"] <= 1 for score in scores.values())
    assert (trained / "samples" / "captions.png").stat().st_size > 1000
    assert "generated" in result.out and "reference" in result.out
