"""Vectors of words: gensim's files and ours are each other's, damage is named, and the embedding starts from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsmoe_vl.config.checks import check_recipe
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.copies import differences, read_copy
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.data.word_start import WordStart, describe_word_start, read_word_start
from dsmoe_vl.data.word_vectors import read_vectors, word_of
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.model.init import first_values
from dsmoe_vl.model.word_rows import fill_words
from dsmoe_vl.moe.placement import placed
from dsmoe_vl.tasks.registry import build_backbone
from tests.support.keyed_vectors import write_text, write_vectors

RNG = np.random.default_rng(2)
WORDS = ["red", "Straße", "日本", "a", "left", "circle"]
VECTORS = RNG.normal(size=(len(WORDS), 12)).astype(np.float32)


def binary(path, words=WORDS, vectors=VECTORS):
    return write_vectors(path, words, vectors)


def text(path, words=WORDS, vectors=VECTORS):
    return write_text(path, words, vectors)


@pytest.mark.parametrize("write", [binary, text])
def test_all_and_wanted_words(tmp_path, write):
    path = write(tmp_path / "v")
    found = read_vectors(path)
    assert (found.words, found.width, list(found.vectors)) == (len(WORDS), 12, WORDS)
    np.testing.assert_array_equal(np.stack(list(found.vectors.values())), VECTORS)
    some = read_vectors(path, ["日本", "nothing", "a"])
    assert list(some.vectors) == ["日本", "a"] and (some.vectors["a"] == VECTORS[3]).all()


def test_many_words_in_pieces_of_the_file(tmp_path):
    """More than is read at a time; words of one letter and of a thousand."""
    vectors = RNG.normal(size=(6000, 100)).astype(np.float32)
    words = [f"{'w' * (number % 1000)}{number}" for number in range(len(vectors))]
    found = read_vectors(binary(tmp_path / "v", words, vectors), words[::7])
    assert list(found.vectors) == words[::7]
    np.testing.assert_array_equal(np.stack(list(found.vectors.values())), vectors[::7])


def test_the_first_of_two_counts_and_names_have_no_blanks(tmp_path):
    found = read_vectors(binary(tmp_path / "v", ["b c", "b_c", "\u2028", "a", "a", "d"]))
    assert list(found.vectors) == ["b_c", "_", "a", "d"] and (found.vectors["b_c"] == VECTORS[0]).all()
    assert word_of("a  b\tc") == "a_b_c"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"v, line 1: b'' is not a number of words and a width"),
        (b"the 0.1 0.2\n", r"line 1: .*GloVe lack this line"),
        (b"3 99999999\n", r"width of 1 to 65536"),
        (b"2 2\na 1 2\nb 1\n", r"v, line 3: 1 numbers after a word, not 2"),
        (b"2 2\na 1 2\nb 1 x\n", r"v, line 3: could not convert"),
        (b"2 2\na 1 2\nb 1 nan\n", r"v, line 3: b'b' has values that are not finite"),
        (b"1 2\na 1 2\nb 1 2\n", r"there is more after its 1 words"),
        (b"2 2\na \0\0\0\0\0\0\0\0b", r"v, byte 14: word 2 of 2 is not there"),
        (b"1 2\na \0\0\0\0\0\0\xc0\x7f", r"v, byte 4: b'a' has values that are not finite"),
        (b"1 2\na \0\0\0\0\0\0\0\0more", r"there is more after its 1 words"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_vectors(tmp_path / "v")


def test_mutated_files(tmp_path):
    sound = [binary(tmp_path / "b").read_bytes(), text(tmp_path / "t").read_bytes()]
    rng = np.random.default_rng(1)
    used = refused = 0
    for number in range(1000):
        content = bytearray(sound[number % 2])
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(24 if rng.random() < 0.5 else len(content)))
            new = bytes(rng.integers(0, 256, int(rng.integers(0, 3)), dtype=np.uint8)) if rng.random() < 0.5 else b"9 "
            content[place : place + int(rng.integers(0, 3))] = new
        (tmp_path / "v").write_bytes(content)
        try:
            found = read_vectors(tmp_path / "v")
            assert all(np.isfinite(one).all() and len(one) == found.width for one in found.vectors.values())
            used += 1
        except DataError as error:
            assert str(tmp_path / "v") in str(error) and len(str(error)) < 500
            refused += 1
    assert used > 50 and refused > 300


class TestStart:
    @pytest.fixture
    def tokenizer(self, tiny):
        return Tokenizer(tiny.data / "tokenizer.model")

    def recipe(self, tiny, path, *more):
        return load_recipe(tiny.recipe, [f"model.embedding_from={path}", *more])

    def test_pieces_by_their_words(self, tokenizer):
        words = tokenizer.words()
        assert len(words) > 5 and not any(word.startswith("\u2581") for word in words)
        for word, row in words.items():
            assert tokenizer.vocabulary.piece(row) == f"\u2581{word}"

    @pytest.mark.parametrize("width", [12, 32])
    def test_lengths_and_angles_stay_and_all_else_too(self, tiny, tokenizer, tmp_path, width):
        vectors = RNG.normal(size=(6, width)).astype(np.float32) * 7 + 2
        recipe = self.recipe(tiny, binary(tmp_path / "v.bin", [*list(tokenizer.words())[:4], "xx", "yy"], vectors))
        start = read_word_start(recipe, tokenizer)
        assert start.rows == tuple(sorted(list(tokenizer.words().values())[:4]))
        model = build_backbone(recipe)
        fill = first_values(model, seed=3)
        for where in placed(model):
            fill(where)
        usual = {name: value.detach().clone() for name, value in model.named_parameters()}
        for name, value in model.named_parameters():
            fill_words(name, value, start, seed=3)
        table = model.embedding.weight.detach()
        rows = list(start.rows)
        assert {name for name, value in model.named_parameters() if not torch.equal(value, usual[name])} == {
            "embedding.weight"
        }
        others = [row for row in range(len(table)) if row not in rows]
        assert torch.equal(table[others], usual["embedding.weight"][others])
        given = torch.from_numpy(start.vectors).double()
        gram, wanted = table[rows].double() @ table[rows].double().T, given @ given.T
        torch.testing.assert_close(gram / gram[0, 0], wanted / wanted[0, 0], rtol=1e-5, atol=1e-6)
        assert float(table[rows].square().mean().sqrt()) == pytest.approx(0.02, rel=1e-5)
        again = usual["embedding.weight"].clone()
        fill_words("embedding.weight", again, start, seed=3)
        assert torch.equal(again, table)

    def test_what_the_plan_says(self, tiny, tokenizer, tmp_path):
        recipe = self.recipe(tiny, binary(tmp_path / "v.bin", [*list(tokenizer.words())[:4], "xx", "yy"]))
        said = describe_word_start(recipe, tokenizer)
        assert f"{tmp_path / 'v.bin'}: 4 of 320 pieces are among its 6 words, turned from 12 values into 32" in said

    def test_files_that_cannot_be_used(self, tiny, tokenizer, tmp_path):
        for path, message in [
            (binary(tmp_path / "wide", vectors=np.ones((6, 40), np.float32)), r"40 values, more than model.width = 32"),
            (binary(tmp_path / "other", ["x", "y"], VECTORS[:2]), r"none of its 2 words is one of the \d+ pieces of"),
            (binary(tmp_path / "zero", vectors=VECTORS * 0), r"or their vectors are zero"),
            (tmp_path / "absent", r"No such file or directory: name a file of vectors"),
        ]:  # fmt: skip
            with pytest.raises(ConfigError, match=rf"model.embedding_from = '{path}': .*{message}"):
                read_word_start(self.recipe(tiny, path), tokenizer)

    def test_not_with_imported_weights(self, tiny, tmp_path):
        recipe = self.recipe(tiny, tmp_path / "v.bin")
        recipe = replace(recipe, model=replace(recipe.model, init_from="imports/x"))
        with pytest.raises(ConfigError, match=r"model.embedding_from = .*have an embedding already"):
            check_recipe(recipe, 1, "r.toml")

    def test_hosts_compare_their_vectors(self, tiny, tmp_path):
        recipes = [self.recipe(tiny, binary(tmp_path / "v.bin"))]
        copies = [read_copy(recipes[0], "rank 0"), read_copy(recipes[0], "rank 1")]
        assert not differences(copies) and not copies[0].problems
        binary(tmp_path / "v.bin", vectors=VECTORS + 1)
        copies.append(read_copy(recipes[0], "rank 2"))
        ((_, told),) = differences(copies)
        assert told.startswith(f"model.embedding_from {tmp_path / 'v.bin'} is another on rank 2")


def test_no_start_changes_nothing():
    table = torch.ones(4, 3)
    fill_words("embedding.weight", table, None, 0)
    fill_words("head.weight", table, WordStart((1,), np.zeros((1, 3), np.float32), 1, 1), 0)
    assert torch.equal(table, torch.ones(4, 3))


class TestGensim:
    @pytest.fixture
    def keyed_vectors(self):
        models = pytest.importorskip("gensim.models", reason="gensim: files of word2vec were not compared with its own")
        return models.KeyedVectors

    @pytest.mark.parametrize("is_binary", [True, False])
    def test_its_files_are_read(self, keyed_vectors, tmp_path, is_binary):
        theirs = keyed_vectors(12)
        theirs.add_vectors(WORDS, VECTORS)
        theirs.save_word2vec_format(str(tmp_path / "v"), binary=is_binary)
        ours = read_vectors(tmp_path / "v")
        assert ours.vectors.keys() == set(WORDS)
        for word in WORDS:
            np.testing.assert_array_equal(ours.vectors[word], theirs[word])

    @pytest.mark.parametrize("write", [binary, text])
    def test_our_files_are_read(self, keyed_vectors, tmp_path, write):
        theirs = keyed_vectors.load_word2vec_format(str(write(tmp_path / "v")), binary=write is binary)
        assert theirs.index_to_key == WORDS
        np.testing.assert_array_equal(theirs.vectors, VECTORS)
