"""`launch/generate.py` and `launch/evaluate.py` on runs of the tiny recipe, as a user starts them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from data_tools.synthetic.films import film
from data_tools.synthetic.scenes import scene
from dsmoe_vl.console import one_line
from launch.generate import main
from tests.distributed.ranks import Finished
from tests.support.runs import REPOSITORY, finish, python, start
from tests.support.trained import THREE_TASKS, random_run

GENERATE, EVALUATE = (REPOSITORY / "launch" / name for name in ("generate.py", "evaluate.py"))


@pytest.fixture(scope="module")
def three_tasks(tiny, tmp_path_factory):
    """A run that has never been trained, of all tasks."""
    return random_run(tiny, tmp_path_factory.mktemp("run") / "run", *THREE_TASKS)


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(scene(np.random.default_rng(n), True, 48, 2)[0])
    (folder / "film.mp4").write_bytes(film(np.random.default_rng(1), True, 48, 2)[0])
    return folder


def generate(command, *arguments):
    """In a process of its own, as a user starts it."""
    return finish(start(python(GENERATE, command, *arguments)))


@pytest.fixture
def here(monkeypatch, capsys):
    """The same command line in this process: starting one takes seconds."""

    def answer(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as exit:
            status = exit.code
        return Finished(status, *capsys.readouterr())

    return answer


def lines(result):
    return [line.split("\t") for line in result.out.splitlines()]


def errors(result):
    assert "Traceback" not in result.err
    return [line for line in result.err.splitlines() if line.startswith("error: ")]


def test_captions_of_files_and_one_that_is_no_image(three_tasks, tmp_path, media):
    (tmp_path / "bad.jpg").write_text("no image")
    images = [tmp_path / "bad.jpg", media / "0.jpg", tmp_path / "missing.jpg"]
    more = ("--max-tokens", 8, "--json", tmp_path / "captions.json")
    result = generate("caption", "--run", three_tasks, "--image", *images, "--video", media / "film.mp4", *more)
    assert result.status == 1
    assert [line[0] for line in lines(result)] == [str(media / "0.jpg"), str(media / "film.mp4")]
    assert all(len(line) == 2 for line in lines(result))
    bad, missing = errors(result)
    assert bad.endswith("bad.jpg: image cannot be decoded: not a JPEG, PNG or WebP; save it as a JPEG, PNG or WebP")
    assert missing.endswith("missing.jpg: No such file or directory; name an existing file")
    rows = json.loads((tmp_path / "captions.json").read_text())
    # A line of the output is one line, whatever an untrained model says.
    assert [[row["file"], one_line(row["caption"])] for row in rows] == lines(result)


def test_captions_of_folders_and_shards_by_beams_and_by_chance(three_tasks, tiny, media, here):
    beams = here("caption", "--run", three_tasks, "--media", media, tiny.data / "videos_eval", "--beam", 2,
                     "--max-tokens", 4)  # fmt: skip
    assert beams.status == 0, beams.err
    names = [str(media / name) for name in ("0.jpg", "1.jpg", "2.jpg", "film.mp4")]
    assert [line[0] for line in lines(beams)] == [*names, *(f"videos_eval-{n:07}" for n in range(4))]
    options = ("caption", "--run", three_tasks, "--media", media, "--max-tokens", 8, "--top-p", 0.9, "--temperature", 2)
    once, again, other = (here(*options, "--seed", seed) for seed in (1, 1, 2))
    assert once.status == 0 and once.out == again.out != other.out


def test_retrieval_with_an_index_and_a_grid(three_tasks, tmp_path, media, here):
    index, picture = tmp_path / "index.safetensors", tmp_path / "grid.png"
    options = ("retrieve", "--run", three_tasks, "--media", media, "--index", index)
    by_text = generate(*options, "--text", "a red square", "--top", 3, "--grid", picture)
    assert by_text.status == 0 and len(lines(by_text)) == 3, by_text.err
    scores = [float(score) for score, _ in lines(by_text)]
    assert scores == sorted(scores, reverse=True) and {len(score) for score, _ in lines(by_text)} <= {6, 7}
    assert "4 files, 4 embedded now" in by_text.err and Image.open(picture).size[0] > 600

    (media / "new.jpg").write_bytes((media / "0.jpg").read_bytes())
    by_image = here(*options, "--image", media / "1.jpg")
    assert lines(by_image)[0] == ["1.0000", str(media / "1.jpg")] and len(lines(by_image)) == 5
    assert "5 files, 1 embedded now" in by_image.err
    by_video = here(*options, "--video", media / "film.mp4")
    assert lines(by_video)[0] == ["1.0000", str(media / "film.mp4")] and "0 embedded now" in by_video.err

    (media / "bad.jpg").write_text("no image")
    without = here(*options[:5], "--text", "a red square", "--top", 3)
    assert without.out == by_text.out and without.status == 1 and "bad.jpg" in errors(without)[0]


def test_summaries_of_videos_one_of_which_is_broken(three_tasks, tmp_path, media):
    (media / "broken.mp4").write_bytes((media / "film.mp4").read_bytes()[:300])
    videos = [media / "broken.mp4", media / "film.mp4"]
    result = generate("summarize", "--run", three_tasks, "--video", *videos, "--output", tmp_path / "out",
                      "--max-tokens", 6, "--key-frames", 2)  # fmt: skip
    assert result.status == 1 and len(errors(result)) == 1 and "broken.mp4: video cannot be decoded" in result.err
    ((name, text, times, folder),) = lines(result)
    assert (name, folder) == (str(media / "film.mp4"), str(tmp_path / "out" / "film"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"film"}
    keys = sorted(path.name for path in (tmp_path / "out" / "film").glob("*.jpg"))
    assert [name[len("key_01_at_") :].replace("s.jpg", " s") for name in keys] == times.split(", ")
    assert Image.open(tmp_path / "out" / "film" / keys[0]).size == (48, 48)
    assert one_line((tmp_path / "out" / "film" / "summary.txt").read_text()) == text
    for picture in ("storyboard.png", "importance.png"):
        assert Image.open(tmp_path / "out" / "film" / picture).size[0] > 400


def test_a_run_that_is_not_there(tmp_path):
    result = generate("caption", "--run", tmp_path / "none", "--image", "a.jpg")
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: no complete checkpoint under") and result.err.count("\n") == 1


def test_what_cannot_be_answered(tiny, three_tasks, tmp_path, media, here):
    """One line that says what to do, and status 2."""
    captions, ask = random_run(tiny, tmp_path / "captions"), ("--text", "a red square")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "text").write_text("no index")
    for arguments, message in [
        (("caption", "--run", three_tasks, "--image", tmp_path / "none.jpg"), "name an existing file"),
        (("caption", "--run", three_tasks, "--media", tmp_path / "empty"), "no pictures, videos or shards in it; name"),
        (("caption", "--run", three_tasks, "--media", media, "--top-p", 2), "top_p = 2: must be above 0 and at most 1"),
        (("caption", "--run", three_tasks, "--media", media, "--seed", 2), "give top_p too"),
        (("retrieve", "--run", captions, "--media", media, *ask), "has learned caption, not retrieval: name a run"),
        (("retrieve", "--run", three_tasks, "--media", tmp_path / "none", *ask), "no such folder; name one"),
        (("retrieve", "--run", three_tasks, "--media", media, "--image", tmp_path / "none"), "name an existing file"),
        (("retrieve", "--run", three_tasks, "--media", media, "--index", tmp_path / "text", *ask), "is not an index"),
        (("summarize", "--run", captions, "--video", media / "film.mp4", "--output", tmp_path), "tasks.summary.weight"),
        (("summarize", "--run", three_tasks, "--video", tmp_path / "bad.mp4", "--output", tmp_path), "a whole video"),
    ]:  # fmt: skip
        result = here(*arguments)
        assert (result.status, result.out) == (2, ""), result.err
        assert result.err.startswith("error: ") and result.err.count("\n") == 1 and message in result.err
    assert not (tmp_path / "bad").exists()
    for arguments, message in [
        (("caption", "--run", three_tasks), "name at least one file with --image or --video, or a folder with --media"),
        (
            ("caption", "--run", three_tasks, "--media", media, "--max-tokens", 0),
            "must be a whole number of at least 1",
        ),
        (
            ("retrieve", "--run", three_tasks, "--media", media),
            "one of the arguments --text --image --video --speech is required",
        ),
    ]:
        result = here(*arguments)
        assert result.status == 2 and message in result.err


def test_evaluation_counts_right_captions(trained, tiny):
    result = finish(start(python(EVALUATE, "--run", trained, "--max-tokens", 8), cold=True))
    assert result.status == 0, result.err
    scores = json.loads((trained / "eval.json").read_text())
    assert {name: score["caption"]["samples"] for name, score in scores.items()} == {
        str(tiny.data / "images_eval"): 8,
        str(tiny.data / "videos_eval"): 4,
    }
    assert all(0 <= score["caption"]["attribute_accuracy"] <= 1 for score in scores.values())
    assert (trained / "samples" / "captions.png").stat().st_size > 1000
    assert "generated" in result.out and "reference" in result.out


def test_evaluation_by_java(trained, tiny):
    """METEOR beside the other scores; what it needs is asked for before any text is generated."""
    arguments = (EVALUATE, "--run", trained, "--data", tiny.data / "images_eval", "--max-tokens", 8, "--java", "meteor")
    result = finish(start(python(*arguments), PATH=""))
    assert result.status == 2 and "METEOR and SPICE need" in result.err and "generated" not in result.out
    if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None:
        pytest.skip("no java or no pycocoevalcap: METEOR of a run was not checked")
    result = finish(start(python(*arguments)))
    assert result.status == 0, result.err
    (scores,) = json.loads((trained / "eval.json").read_text()).values()
    assert 0 <= scores["caption"]["meteor"] <= 1 and "bleu4" in scores["caption"]
    assert "METEOR (0 to 1)" in (trained / "report.html").read_text()
