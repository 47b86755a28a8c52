"""Training a tokenizer: lossless, reproducible, special tokens out of reach of captions, no text silently dropped."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from data_tools.synthetic.generate import generate
from data_tools.tokenizer.train import reservoir, train
from data_tools.writer import ShardWriter
from dsmoe_vl.config.control_symbols import CONTROL_SYMBOLS
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from tests.support.tars import write_tar


def shards(folder, texts):
    with ShardWriter(folder, "train") as writer:
        for i, text in enumerate(texts):
            writer.write(f"text-{i}", None, "", text, {"captions": [text]})
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    generate(folder, images=300, videos=60, eval_images=50, eval_videos=20)
    return folder


@pytest.fixture(scope="module")
def tokenizer(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("tokenizer") / "new" / "tokenizer.model"
    return train([world / "images_train", world / "videos_train"], output)


def test_the_loader_accepts_it_and_ids_are_the_agreed_ones(tokenizer):
    assert (tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos) == (0, 1, 2, 3)
    assert [tokenizer.control(symbol) for symbol in CONTROL_SYMBOLS] == list(range(4, 11))


def test_held_out_captions_are_short_and_come_back(world, tokenizer):
    for folder in ("images_eval", "videos_eval"):
        for sample in iterate_samples(SourceConfig.at(world / folder)):
            for text in contents_of(sample).texts:
                ids = tokenizer.encode(text)
                assert tokenizer.decode(ids) == text
                assert len(ids) <= 1.5 * len(text.split()) + 2


@pytest.mark.parametrize("text", ["a\tb\n c  d ", "  ", "日本語 😀", "<image> </s> <0x41>", "\x00\x01", "red  circle"])
def test_lossless_for_what_it_has_never_seen(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=11) >= 11  # neither a control symbol nor <unk>


def test_same_texts_same_pieces(world, tokenizer, tmp_path):
    again = train([world / "images_train", world / "videos_train"], tmp_path / "again.model")
    assert again.sha256 == tokenizer.sha256 == Tokenizer(tmp_path / "again.model").sha256


def test_a_small_corpus_gets_the_largest_vocabulary_it_fills(world, tmp_path, capsys):
    tokenizer = train([world / "videos_train"], tmp_path / "a.model", vocab_size=8000)
    assert f"the texts have only {tokenizer.size} pieces, not 8000" in capsys.readouterr().out
    assert 267 < tokenizer.size < 8000
    assert train([world / "videos_train"], tmp_path / "b.model", vocab_size=350).size == 350


def test_real_captions(shared_data, tmp_path):
    from data_tools.convert import convert
    from data_tools.formats import Record
    from data_tools.parts import Settings

    photos = sorted((shared_data / "coco_cc_by" / "train2017").iterdir())
    novel = (shared_data / "text" / "botchan.txt").read_text(encoding="utf-8-sig").split("\n")
    lines = [novel[i :: len(photos)] for i in range(len(photos))]
    records = [Record(p.stem, "image", p, text) for p, text in zip(photos, lines, strict=True)]
    convert(records, tmp_path / "shards", Settings("novel"))
    tokenizer = train([tmp_path / "shards"], tmp_path / "tokenizer.model", vocab_size=3000)
    assert tokenizer.size == 3000
    assert all(tokenizer.decode(tokenizer.encode(line)) == line for line in novel)


def test_texts_that_the_trainer_would_drop_are_used(tmp_path):
    long = "walrus " * 200_000  # more than SentencePiece takes in one line
    texts = [
        long,
        "a zebra\x00 with a NUL " * 20_000,
        "a quokka with a \u2585 " * 20_000,
        "an \ud83d axolotl " * 20_000,
    ]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    tokenizer = train([shards(tmp_path / "shards", texts)], tmp_path / "tokenizer.model", vocab_size=330)
    for word in (" walrus", " zebra", " quokka", " axolotl"):
        assert len(tokenizer.encode("a" + word)) <= 3, word


def test_which_texts_a_sample_gives():
    def texts(text, **meta):
        return list(contents_of(Sample("key", SourceConfig(), 0, None, "", text, meta)).texts)

    assert texts("one", captions=["one", "two"], summary="three") == ["one", "two", "three"]
    assert texts("one") == ["one"]
    assert texts(" ", captions=[None, "", "two"]) == ["two"]


def test_reservoir_is_seeded_and_uniform():
    texts = [str(i) for i in range(10)]
    assert reservoir(texts, 20, random.Random(1)) == (texts, 10)
    assert reservoir(texts, 3, random.Random(1)) == reservoir(texts, 3, random.Random(1))
    counts = Counter(text for seed in range(2000) for text in reservoir(texts, 3, random.Random(seed))[0])
    assert len(counts) == 10 and all(500 < count < 700 for count in counts.values())


def test_max_samples_says_what_is_left_out(world, tmp_path, capsys):
    train([world / "images_train"], tmp_path / "tokenizer.model", max_samples=50, seed=3)
    assert "training on 50 of 10" in capsys.readouterr().out


def test_bad_samples_are_counted_and_the_others_used(tmp_path, capsys):
    members = [member for i in range(200) for member in ((f"{i}.txt", b"a dog %d" % i), (f"{i}.json", b"{}"))]
    bad = [
        ("json.txt", b"x"), ("json.json", b"{bad"),
        ("list.txt", b"x"), ("list.json", b"[]"),
        ("latin.txt", b"caf\xe9"),
        ("large.txt", b"word " * 2_000_000),
        ("nul.txt", b"\0"), ("unseen.txt", "\u200b\ufeff".encode()),
    ]  # fmt: skip
    write_tar(tmp_path / "s" / "a.tar", [*members[:100], *bad, *members[100:]])
    damaged = write_tar(tmp_path / "s" / "b.tar", members[:10])
    damaged.write_bytes(damaged.read_bytes()[:5_000])
    tokenizer = train([tmp_path / "s"], tmp_path / "a.model", vocab_size=400)
    assert tokenizer.decode(tokenizer.encode("a dog 7")) == "a dog 7"
    said = capsys.readouterr().out
    for line in (
        f"not used: 3 x malformed text or JSON, the first in a.tar, number 50: {tmp_path}/s/a.tar: json: ",
        "not used: 1 x file too large, the first in a.tar, number 53: large.txt: 10000000 bytes, more than data.",
        "not used: 2 x no caption, the first in nul: no text in",
        f"not used: 1 x damaged shard, the first in b.tar, number 2: {tmp_path}/s/b.tar: truncated at byte ",
    ):
        assert line in said


def test_errors(world, tmp_path):
    data = [world / "images_train"]
    with pytest.raises(DataError, match=r"--vocab-size 100: .* alone need \d+ pieces"):
        train(data, tmp_path / "a.model", vocab_size=100)
    with pytest.raises(DataError, match="--vocab-size"):
        train(data, tmp_path / "a.model", vocab_size=-5)
    with pytest.raises(DataError, match="--max-samples 0"):
        train(data, tmp_path / "a.model", max_samples=0)
    with pytest.raises(DataError, match="no captions in"):
        train([shards(tmp_path / "empty", [" ", ""])], tmp_path / "a.model")
    for number, texts in enumerate((["\0"], ["\u200b", "\ufeff"], ["\u2585"])):
        with pytest.raises(DataError, match=r"no captions in .*: a tokenizer needs text"):
            train([shards(tmp_path / f"unseen{number}", texts)], tmp_path / "a.model")
    with pytest.raises(DataError, match="no such folder"):
        train([tmp_path / "gone"], tmp_path / "a.model")
    (tmp_path / "a.model").touch()
    with pytest.raises(DataError, match=r"a.model exists"):
        train(data, tmp_path / "a.model")
