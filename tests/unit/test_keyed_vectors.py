"""Retrieval embeddings of shards as files of word2vec, read by our reader, by gensim, and through the program."""

from __future__ import annotations

import numpy as np
import pytest

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.word_vectors import read_vectors
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.inference.embed import embed_media, embed_texts
from dsmoe_vl.inference.keyed_vectors import Counts, describe_counts, export_keyed_vectors
from dsmoe_vl.inference.load import load_run
from tests.support.runs import REPOSITORY, finish, python, start
from tests.support.tars import encoded_as, picture, write_tar
from tests.support.trained import THREE_TASKS, random_run


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return random_run(tiny, tmp_path_factory.mktemp("run") / "run", *THREE_TASKS)


@pytest.fixture(scope="module")
def trained(run):
    return load_run(run)


def test_all_samples_with_their_own_embeddings(tiny, trained, tmp_path):
    folder = tiny.data / "videos_eval"
    counts = export_keyed_vectors(trained, str(folder), tmp_path / "out", lambda *told: pytest.fail(str(told)))
    samples = list(iterate_samples(SourceConfig.at(folder)))
    media, texts = (read_vectors(tmp_path / "out" / name) for name in ("media.bin", "text.bin"))
    assert list(media.vectors) == [sample.key for sample in samples]
    wanted = {f"{s.key}/{n}": text for s in samples for n, text in enumerate(contents_of(s).captions)}
    assert list(texts.vectors) == list(wanted)
    assert (counts.media, counts.texts, counts.left_out, counts.width) == (len(samples), len(wanted), 0, 16)
    for found, ours in [
        (media, embed_media(trained, samples)),
        (texts, embed_texts(trained, list(wanted.values()))),
    ]:
        vectors = np.stack(list(found.vectors.values()))
        np.testing.assert_allclose(vectors, ours, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def strange(folder):
    photo = encoded_as(picture(), "JPEG")
    members = [
        ("a b.jpg", photo),
        ("a b.txt", b"a dog"),
        ("c.jpg", photo),
        ("d.jpg", b"\xff\xd8\xff no"),
        ("d.txt", b"x"),
    ]
    write_tar(folder / "0.tar", members)
    write_tar(folder / "1.tar", [("c.jpg", photo), ("c.txt", b"again")])
    return folder


def test_what_is_left_out_is_told(trained, tmp_path, capsys):
    told = {}
    counts = export_keyed_vectors(trained, str(strange(tmp_path / "s")), tmp_path / "out", told.__setitem__)
    assert counts == Counts(media=2, texts=1, without_text=1, renamed=1, left_out=2, width=16)
    assert list(told) == ["d", f"{tmp_path / 's'}/1.tar#0"] and "the name c occurs twice" in list(told.values())[1]
    assert list(read_vectors(tmp_path / "out" / "media.bin").vectors) == ["a_b", "c"]
    assert list(read_vectors(tmp_path / "out" / "text.bin").vectors) == ["a_b/0"]
    describe_counts(counts)
    said = capsys.readouterr().out
    assert (
        "1 pictures and videos whose keys had blanks, which became _" in said and "2 pictures and videos left" in said
    )


def test_what_cannot_be_exported(tiny, trained, tmp_path):
    write_tar(tmp_path / "bad" / "0.tar", [("a.jpg", b"no"), ("a.txt", b"x")])
    with pytest.raises(DataError, match=r"none of its 1 pictures and videos can be used"):
        export_keyed_vectors(trained, str(tmp_path / "bad"), tmp_path / "out", lambda *told: None)
    assert not list((tmp_path / "out").iterdir())
    untaught = load_run(random_run(tiny, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"has learned caption, not retrieval"):
        export_keyed_vectors(untaught, str(tmp_path / "bad"), tmp_path / "new", lambda *told: None)
    assert not (tmp_path / "new").exists()


def test_without_captions_there_is_no_file_of_them(trained, tmp_path, capsys):
    write_tar(tmp_path / "s" / "0.tar", [("a.jpg", encoded_as(picture(), "JPEG"))])
    describe_counts(export_keyed_vectors(trained, str(tmp_path / "s"), tmp_path / "out", lambda *told: None))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["media.bin"]
    assert "no text.bin: no sample has a caption" in capsys.readouterr().out


def test_the_program(run, tmp_path):
    export = REPOSITORY / "launch" / "export.py"
    given = ["--run", run, "--output", tmp_path / "out", "--format", "keyedvectors"]
    refused = finish(start(python(export, *given)))
    assert refused.status == 2 and "--format keyedvectors and --data SHARDS need each other" in refused.err
    done = finish(start(python(export, *given, "--data", strange(tmp_path / "s"))))
    assert done.status == 1 and done.err.count("\n") == 2 and "the name c occurs twice" in done.err
    assert "  media.bin: 2 pictures and videos, vectors of 16\n" in done.out and f"wrote {tmp_path / 'out'}" in done.out


def test_gensim_finds_what_we_find(tiny, trained, tmp_path):
    models = pytest.importorskip("gensim.models", reason="gensim: exported embeddings were not opened with it")
    export_keyed_vectors(trained, str(tiny.data / "images_eval"), tmp_path / "out", lambda *told: None)
    media, texts = (
        models.KeyedVectors.load_word2vec_format(str(tmp_path / "out" / name), binary=True)
        for name in ("media.bin", "text.bin")
    )
    ours = read_vectors(tmp_path / "out" / "media.bin")
    assert media.index_to_key == list(ours.vectors) and len(media) == 8
    np.testing.assert_array_equal(media.vectors, np.stack(list(ours.vectors.values())))
    key = texts.index_to_key[3]
    (first, score), *_ = media.similar_by_vector(texts[key], topn=3)
    scores = {name: float(vector @ texts[key]) for name, vector in ours.vectors.items()}
    assert score == pytest.approx(max(scores.values()), abs=1e-5) == scores[first]
