"""The index of media: found again while it is right, made again where it is not."""

from __future__ import annotations

import os

import numpy as np
import pytest

from data_tools.synthetic.films import film
from data_tools.synthetic.scenes import scene
from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.inference import index as index_module
from dsmoe_vl.inference.embed import embed_media, embed_texts
from dsmoe_vl.inference.index import MediaIndex, Row, model_hash, update_index
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.inference.media import open_media
from tests.support.trained import THREE_TASKS, random_run


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    return load_run(random_run(tiny, tmp_path_factory.mktemp("run") / "run", *THREE_TASKS))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media").mkdir()
    for n in range(4):
        (tmp_path / "media" / f"{n}.jpg").write_bytes(scene(np.random.default_rng(n), True, 48, 2)[0])
    (tmp_path / "media" / "film.mp4").write_bytes(film(np.random.default_rng(9), True, 48, 2)[0])
    return tmp_path / "media"


def updated(old, trained, folder, failed=None):
    told = [] if failed is None else failed
    return update_index(old, trained, open_media(str(folder), DataConfig()), lambda *words: told.append(words))


def test_rows_are_those_of_the_files(trained, folder):
    index, embedded = updated(None, trained, folder)
    assert embedded == 5 and [os.path.basename(row.name) for row in index.rows] == [
        "0.jpg", "1.jpg", "2.jpg", "3.jpg", "film.mp4",
    ]  # fmt: skip
    alone = [embed_media(trained, [item.read()])[0] for item in open_media(str(folder), DataConfig())]
    np.testing.assert_allclose(index.embeddings, alone, atol=1e-5)
    question = embed_texts(trained, ["a red square"])[0]
    hits = index.search(question, 3)
    scores = [float(vector @ question) for vector in alone]
    assert [hit.row for hit in hits] == [index.rows[i] for i in np.argsort(scores)[::-1][:3]]
    np.testing.assert_allclose([hit.score for hit in hits], sorted(scores)[::-1][:3], atol=1e-5)
    assert index.search(index.embeddings[2], 1)[0].score == pytest.approx(1, abs=1e-5)
    assert len(index.search(question, 100)) == 5


def test_only_what_is_new_is_embedded(trained, folder, tmp_path):
    first, _ = updated(None, trained, folder)
    first.save(tmp_path / "deep" / "index")
    again = MediaIndex.load(tmp_path / "deep" / "index")
    assert (
        again.rows == first.rows and again.model == first.model and np.array_equal(again.embeddings, first.embeddings)
    )

    same, embedded = updated(again, trained, folder)
    assert embedded == 0 and same.rows == first.rows and np.array_equal(same.embeddings, first.embeddings)

    (folder / "0.jpg").unlink()  # one goes, one comes, one becomes another
    (folder / "4.jpg").write_bytes((folder / "1.jpg").read_bytes())
    (folder / "2.jpg").write_bytes(scene(np.random.default_rng(77), True, 48, 2)[0])
    changed, embedded = updated(again, trained, folder)
    assert embedded == 2 and len(changed.rows) == 5
    fresh, _ = updated(None, trained, folder)
    by_name = dict(zip((row.name for row in fresh.rows), fresh.embeddings, strict=True))
    assert {row.name for row in changed.rows} == set(by_name)
    for row, vector in zip(changed.rows, changed.embeddings, strict=True):
        np.testing.assert_allclose(vector, by_name[row.name], atol=1e-5)

    os.utime(folder / "1.jpg", ns=(0, 0))  # of equal size, written later
    assert updated(changed, trained, folder)[1] == 1


def test_another_model_embeds_everything_again(trained, tiny, folder, tmp_path):
    index, _ = updated(None, trained, folder)
    other = load_run(random_run(tiny, tmp_path / "other", *THREE_TASKS, seed=4))
    assert updated(index, other, folder)[1] == 5
    frames = load_run(random_run(tiny, tmp_path / "frames", *THREE_TASKS, "data.video_frames=3"))
    assert len({model_hash(model) for model in (trained, other, frames)}) == 3
    assert model_hash(load_run(random_run(tiny, tmp_path / "moved", *THREE_TASKS))) == model_hash(trained)


def test_shards_are_indexed_by_their_keys(trained, tiny):
    index, embedded = updated(None, trained, tiny.data / "videos_eval")
    assert embedded == 4 and [row.name for row in index.rows] == [f"videos_eval-{n:07}" for n in range(4)]
    assert updated(index, trained, tiny.data / "videos_eval")[1] == 0


def test_bad_files_are_named_and_left_out(trained, folder):
    (folder / "1.jpg").write_text("no image")
    failed = []
    index, embedded = updated(None, trained, folder, failed)
    assert embedded == 4 and len(index.rows) == 4
    assert [name for name, _ in failed] == [str(folder / "1.jpg")]


def test_an_interrupted_index_goes_on(trained, folder, monkeypatch):
    monkeypatch.setattr(index_module, "_PARTS", 0)  # a checkpoint after every batch
    saved = []
    media = open_media(str(folder), DataConfig())
    update_index(
        None, trained, media, lambda *_: None, lambda index: saved.append((list(index.rows), index.embeddings))
    )
    assert [len(rows) for rows, _ in saved] == [5] and len(saved[0][1]) == 5


def test_files_that_are_no_index(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match=r"text is not an index of `retrieve`: name another file, or remove this one"):
        MediaIndex.load(tmp_path / "text")
    with pytest.raises(DataError, match="is not an index"):
        MediaIndex.load(tmp_path)
    whole = MediaIndex("model", [Row("a", "/a", 1, 2)], np.zeros((1, 3), np.float32))
    whole.save(tmp_path / "index")
    content = (tmp_path / "index").read_bytes()
    for cut in (content[:-1], content[:20], b"", content.replace(b"dsmoe_vl media index 1", b"dsmoe_vl media index 9")):
        (tmp_path / "cut").write_bytes(cut)
        with pytest.raises(DataError, match="is not an index"):
            MediaIndex.load(tmp_path / "cut")
    with pytest.raises(DataError, match=r"cannot be written: .*; name another file"):
        whole.save(tmp_path / "text" / "index")


def test_a_run_that_has_not_learned_retrieval(tiny, tmp_path, folder):
    captions = load_run(random_run(tiny, tmp_path / "captions"))
    with pytest.raises(
        ConfigError, match=r"has learned caption, not retrieval: name a run .* tasks\.retrieval\.weight"
    ):
        updated(None, captions, folder)
