"""The Python interface, the settings of searches, key frames and the files of a summary."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import dsmoe_vl
from data_tools.synthetic.films import film
from data_tools.synthetic.scenes import scene
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.errors import CheckpointError, ConfigError, DataError
from dsmoe_vl.files import distinct_names
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.inference.media import read_file
from dsmoe_vl.inference.summarize import VideoSummary
from dsmoe_vl.inference.summary_files import write_summary
from dsmoe_vl.inference.token_search import Search
from tests.support.trained import THREE_TASKS, random_run


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return random_run(tiny, tmp_path_factory.mktemp("run") / "run", *THREE_TASKS)


@pytest.fixture(scope="module")
def model(run):
    return dsmoe_vl.load(run, device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(scene(np.random.default_rng(n), True, 48, 2)[0])
        (folder / f"{n}.mp4").write_bytes(film(np.random.default_rng(n), True, 48, 2)[0])
    return folder


def test_importing_the_package_is_cheap():
    code = "import sys, dsmoe_vl; assert not {'torch', 'numpy'} & set(sys.modules); assert 'load' in dir(dsmoe_vl)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dsmoe_vl.nothing


def test_lists_in_lists_out(model, files):
    photo, clip = files / "0.jpg", files / "0.mp4"
    photos, clips = [files / f"{n}.jpg" for n in range(3)], [files / f"{n}.mp4" for n in range(3)]
    captions = model.caption(photos, max_tokens=6)
    assert isinstance(captions, list) and captions[0] == model.caption(photo, max_tokens=6) and len(captions) == 3
    assert model.caption_video(clips, max_tokens=6)[2] == model.caption_video(clips[2], max_tokens=6)
    for embed, one, many in [
        (model.embed_image, photo, photos),
        (model.embed_video, clip, clips),
        (model.embed_text, "a red square", ["a red square", "a ring", "two"]),
    ]:
        rows = embed(many)
        assert rows.shape == (3, 16) and rows.dtype == np.float32 and embed(one).shape == (16,)
        np.testing.assert_allclose(rows[0], embed(one), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    summaries = model.summarize(clips, max_tokens=6)
    assert summaries[0].text == model.summarize(clip, max_tokens=6).text and len(summaries) == 3
    assert len(summaries[0].seconds) == len(summaries[0].importance) == 4
    assert model.caption([]) == [] and model.summarize([]) == []
    with pytest.raises(DataError, match="nothing to embed"):
        model.embed_image([])


def test_a_picture_in_any_form(model, files):
    path = files / "1.jpg"
    pixels = decode_image(path.read_bytes())
    forms = [path, str(path), path.read_bytes(), Image.open(path), pixels]
    rows = model.embed_image(forms)
    np.testing.assert_allclose(rows, np.repeat(rows[:1], len(forms), axis=0), atol=1e-5)


def test_similarity(model):
    a, b = model.embed_text(["one", "two"]), model.embed_text(["one", "two", "three"])
    table = model.similarity(a, b)
    assert table.shape == (2, 3) and table[1, 2] == pytest.approx(model.similarity(a[1], b[2]))
    assert isinstance(model.similarity(a[0], b[0]), float) and model.similarity(a[0], b[0]) == pytest.approx(1)
    assert model.similarity(a[0], b).shape == (3,)


def test_what_cannot_be_used_is_named(model, files, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    for ask, given, message in [
        (model.caption, tmp_path / "notes.txt", r"^/.*notes\.txt: image cannot be decoded.*; save it as a JPEG"),
        (model.embed_image, [files / "0.jpg", tmp_path / "notes.txt"], r"notes\.txt: image cannot be decoded"),
        (model.summarize, tmp_path / "notes.txt", r"notes\.txt: video cannot be decoded"),
        (model.caption, np.zeros((0, 5, 3), np.uint8), r"from ndarray of uint8 \[0, 5, 3\]: give a path"),
        (model.embed_text, 5, "a text cannot be made from int"),
        (model.embed_text, ["a", None], "a text cannot be made from NoneType"),
        (lambda b: model.similarity(model.embed_text("a"), b), np.zeros(3), r"of \[\d+\] and \[3\] cannot be compared"),
    ]:
        with pytest.raises(DataError, match=message):
            ask(given)
    with pytest.raises(ConfigError, match="max_tokens = 0: must be at least 1"):
        model.caption(files / "0.jpg", max_tokens=0)


def test_searches_by_name(model, files):
    path = files / "0.jpg"
    assert model.caption(path, beams=3, max_tokens=5) == model.caption(path, beams=3, max_tokens=5)
    texts = {model.caption(path, top_p=1.0, temperature=3.0, seed=seed, max_tokens=5) for seed in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize(("settings", "message"), [
    ({"beams": 0}, "beams = 0: must be at least 1"),
    ({"beams": 2, "top_p": 0.5}, "exclude each other"),
    ({"top_p": 0.0}, "top_p = 0: must be above 0 and at most 1"),
    ({"top_p": 1.5}, r"top_p = 1\.5: must be"),
    ({"top_p": 0.9, "temperature": 0.0}, "temperature = 0: must be above 0"),
    ({"top_p": 0.9, "seed": -1}, "seed = -1: must be at least 0"),
    ({"temperature": 0.5}, "give top_p too"),
    ({"seed": 1}, "give top_p too"),
])  # fmt: skip
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        Search(**settings)


def test_wrong_runs_and_devices(tiny, run, tmp_path, files):
    with pytest.raises(CheckpointError, match="no complete checkpoint under"):
        dsmoe_vl.load(tmp_path)
    for device, message in [
        ("tpu9", "is unknown: give cpu"),
        ("mps", "is not supported"),
        ("cuda:99", "GPUs are visible"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_run(run, device)
    retrieval = random_run(
        tiny, tmp_path / "retrieval", *THREE_TASKS, "tasks.caption.weight=0", "tasks.summary.weight=0"
    )
    model = dsmoe_vl.load(retrieval, "cpu")
    for ask, task in [(model.caption, "caption"), (model.caption_video, "caption"), (model.summarize, "summary")]:
        with pytest.raises(ConfigError, match=f"has learned retrieval, not {task}: name a run"):
            ask(files / "0.mp4")


def test_weights_of_another_model_give_one_line(tiny, tmp_path):
    run = random_run(tiny, tmp_path / "run")
    plan = run / "plan.json"
    plan.write_text(plan.read_text().replace('"ffn_width": 64', '"ffn_width": 96'))
    with pytest.raises(CheckpointError, match=r"does not fit the model of .* Name a run of this version") as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


def summary_of(importance, seconds=None):
    importance = np.array(importance, np.float32)
    return VideoSummary(
        "text", np.arange(len(importance), dtype=np.float32) if seconds is None else seconds, importance
    )


def test_key_frames_are_important_and_apart():
    summary = summary_of([0.1, 0.8, 0.9, 0.7, 0.1, 0.1, 0.5, 0.1])
    assert summary.key_frames(1) == [2]
    assert summary.key_frames(2) == [2, 6]  # 1 and 3 belong to the event of 2
    assert summary.key_frames(3) == [1, 2, 6]  # rather than one that does not matter
    assert summary.key_frames(100) == list(range(8))
    assert summary.key_frames() == summary.key_frames(2)  # 15 % of 8, rounded up
    assert summary_of([0.3]).key_frames() == [0]
    assert summary_of([0.5, 0.5, 0.5, 0.5]).key_frames(2) == [0, 3]


def test_the_files_of_a_summary(run, files, tmp_path):
    trained = load_run(run)
    sample = read_file(files / "1.mp4", "video")
    frames = decode_video(sample.media, trained.recipe.data.video_frames)
    seconds = np.array([second for second, _ in frames], np.float32)
    summary = summary_of([0.2, 0.9, 0.1, 0.6], seconds)
    folder = tmp_path / "deep" / "1"
    folder.mkdir(parents=True)
    (folder / "key_07_at_99.00s.jpg").touch()  # of an earlier summary
    (folder / "notes.jpg").touch()
    written = write_summary(trained, sample, summary, folder, 2)
    assert [path.name for path in written] == [f"key_01_at_{seconds[1]:.2f}s.jpg", f"key_02_at_{seconds[3]:.2f}s.jpg"]
    assert {path.name for path in folder.iterdir()} == {
        "summary.txt", "storyboard.png", "importance.png", "notes.jpg", *(path.name for path in written),
    }  # fmt: skip
    assert (folder / "summary.txt").read_text() == "text\n"
    shown = np.asarray(Image.open(written[1])).astype(int)
    assert shown.shape == frames[3][1].shape and np.abs(shown - frames[3][1]).mean() < 3
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file.* cannot be written: .*; name another --output"):
        write_summary(trained, sample, summary, tmp_path / "file" / "1", 2)


def test_folders_of_videos_with_one_name(tmp_path):
    paths = [tmp_path / name for name in ("a/x.mp4", "b/x.mp4", "x_2.mp4", "y.webm")]
    assert distinct_names(path.stem for path in paths) == ["x", "x_2", "x_2_2", "y"]
