"""Tokenizers of other makers: ids as their own libraries give them, and control symbols that no text can forge."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
import unicodedata

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from dsmoe_vl.config.control_symbols import CONTROL_SYMBOLS, ControlsConfig
from dsmoe_vl.config.model import ModelConfig
from dsmoe_vl.config.recipe import Recipe, TokenizerConfig
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Segment
from dsmoe_vl.data.tokenizer import Tokenizer, hash_rows
from dsmoe_vl.errors import ConfigError
from tests.support.tokenizers import CONTROL_TEXT, NASTY, byte_level, sentencepiece_model, unigram

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers: tokenizer.json was not read")

LLAMA = TokenizerConfig(bos="<s>")
QWEN = TokenizerConfig(eos="<|endoftext|>")
XLM = TokenizerConfig(bos="<s>", eos="</s>")
GEMMA = TokenizerConfig(bos="<bos>", controls=ControlsConfig(image="<unused0>", video="[control_8]"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The file of each kind, and the settings of a recipe for it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    gemma = {
        "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "add_dummy_prefix": False,
        "user_defined_symbols": ["<unused0>", "<caption>"], "control_symbols": ["[control_8]"],
    }  # fmt: skip
    return {
        "llama": (sentencepiece_model(folder / "llama.model"), LLAMA),
        "unigram model": (
            sentencepiece_model(
                folder / "u.model", model_type="unigram", vocab_size=330, normalization_rule_name="nmt_nfkc"
            ),
            LLAMA,
        ),
        "gemma": (sentencepiece_model(folder / "gemma.model", **gemma), GEMMA),
        "qwen": (byte_level(folder / "qwen.json"), QWEN),
        "xlm": (unigram(folder / "xlm.json"), XLM),
    }


@pytest.fixture(params=("llama", "unigram model", "gemma", "qwen", "xlm"))
def made(request, files):
    return Tokenizer(*files[request.param])


def test_words_are_pieces_with_a_blank_before_them(made):
    words = made.words()
    assert len(words) >= 3 and all(word == word.strip() and word for word in words)
    for word, row in words.items():
        assert made.decode([made.encode("x")[-1], row]).endswith(f" {word}") and row not in silent(made)


def silent(tokenizer):
    return set(range(tokenizer.size)) - set(tokenizer.spoken)


def encoded_elsewhere(tokenizer, queue):
    queue.put([tokenizer.encode(text) for text in NASTY])


@pytest.mark.parametrize("kind", ("llama", "unigram model"))
def test_ids_are_those_of_sentencepiece(files, kind):
    tokenizer, theirs = Tokenizer(*files[kind]), SentencePieceProcessor(model_file=str(files[kind][0]))
    assert [tokenizer.encode(text) for text in NASTY] == [theirs.encode(text) for text in NASTY]
    assert tokenizer.new_rows == range(theirs.get_piece_size(), theirs.get_piece_size() + 7)
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.begin) == (0, 1, 2, (1,))
    assert [tokenizer.control(symbol) for symbol in CONTROL_SYMBOLS] == list(tokenizer.new_rows)
    assert tokenizer.decode(tokenizer.encode("a red ball")) == "a red ball"


def test_ids_are_those_of_tokenizers_and_of_transformers(files):
    """Of the unigram kind: where no text names a special piece, which it takes for one."""
    transformers = pytest.importorskip("transformers", reason="transformers: ids were not compared")
    for kind in ("qwen", "xlm"):
        tokenizer = Tokenizer(*files[kind])
        library = tokenizers.Tokenizer.from_file(str(files[kind][0]))
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(files[kind][0]), split_special_tokens=True)
        for text in NASTY:
            ids = tokenizer.encode(text)
            if kind == "qwen" or "<" not in text:
                assert ids == library.encode(text, add_special_tokens=False).ids, text
                assert ids == fast.encode(text, add_special_tokens=False), text
            elif "</s>" in text:
                assert 2 in library.encode(text, add_special_tokens=False).ids and 2 not in ids


def test_bytes_come_back(files):
    for kind in ("qwen", "gemma"):
        tokenizer = Tokenizer(*files[kind])
        plain = [text for text in NASTY if kind == "qwen" or "\u2581" not in text]
        plain = [unicodedata.normalize("NFC", text) if kind == "qwen" else text for text in plain]
        assert [tokenizer.decode(tokenizer.encode(text)) for text in plain] == plain


@pytest.mark.parametrize(
    "text", [*NASTY, "<caption>", "\ud83d half", CONTROL_TEXT * 300], ids=lambda text: ascii(text)[:24]
)
def test_no_text_becomes_a_control_id(made, text):
    ids = made.encode(text)
    assert silent(made).isdisjoint(ids)
    assert bool(ids) == bool(text) or text in (" ", "\u200b\ufeff")
    controls = [made.control(symbol) for symbol in CONTROL_SYMBOLS]
    assert made.decode([*controls, *made.begin, *ids, made.eos, made.size, made.size + 5]) == made.decode(ids)


def test_a_worker_reads_it_again_as_it_is(made):
    copy = pickle.loads(pickle.dumps(made))
    assert (copy.sha256, copy.begin, copy.eos, copy.size) == (made.sha256, made.begin, made.eos, made.size)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=encoded_elsewhere, args=(made, queue))
    worker.start()
    assert queue.get(timeout=60) == [made.encode(text) for text in NASTY]
    worker.join()


def test_named_pieces_stand_for_symbols(files):
    tokenizer = Tokenizer(*files["gemma"])
    theirs = SentencePieceProcessor(model_file=str(files["gemma"][0]))
    assert tokenizer.control("<image>") == theirs.piece_to_id("<unused0>")
    assert tokenizer.control("<video>") == theirs.piece_to_id("[control_8]")
    assert tokenizer.control("<caption>") >= theirs.get_piece_size()  # its own is an HTML tag of texts
    assert len(tokenizer.new_rows) == 5 and tokenizer.pad == 0
    assert theirs.piece_to_id("<caption>") in tokenizer.encode("a <caption>")
    assert tokenizer.decode(tokenizer.encode("a <unused0> b")) == "a <unused0> b"
    assert tokenizer.sha256 != Tokenizer(files["gemma"][0]).sha256


def test_what_byte_level_bpe_lacks_gets_a_row(files):
    tokenizer = Tokenizer(*files["qwen"])
    assert tokenizer.unk == tokenizer.vocabulary.size and len(tokenizer.new_rows) == 8
    assert tokenizer.begin == () and tokenizer.bos is None and tokenizer.pad == tokenizer.eos
    mapped = Tokenizer(files["qwen"][0], TokenizerConfig(controls=ControlsConfig(image="<|image_pad|>")))
    assert mapped.control("<image>") == tokenizer.vocabulary.row("<|image_pad|>") and len(mapped.new_rows) == 7


def test_settings_of_the_file_that_change_texts_are_off(files):
    assert len(Tokenizer(*files["xlm"]).encode("a red ball left of a grey cube")) > 7
    assert len(Tokenizer(*files["xlm"]).encode("a")) < 5


def test_wrong_settings_are_named(files):
    def refused(kind, message, **settings):
        with pytest.raises(ConfigError, match=message) as error:
            Tokenizer(files[kind][0], TokenizerConfig(**settings)).eos  # noqa: B018
        assert "\n" not in str(error.value)

    refused("qwen", r"qwen.json does not say which piece ends a text: set tokenizer.eos")
    refused("qwen", r"tokenizer.eos = '</z>': .*qwen.json has no such piece", eos="</z>")
    refused("qwen", r"tokenizer.eos = 'a' is a piece of .* that texts consist of", eos="a")
    refused("llama", r"tokenizer.bos = '<bos>': .*llama.model has no such piece", bos="<bos>")
    spoken = ControlsConfig(frame="▁a")
    refused("llama", r"tokenizer.controls.frame = '▁a' is a piece of .* that texts consist of", controls=spoken)
    twice = ControlsConfig(image="<unused0>", video="<unused0>")
    refused("gemma", r"tokenizer.controls names a piece of .*gemma.model twice", controls=twice)


def test_a_recipe_needs_room_and_the_right_pieces(files):
    def recipe(**settings):
        settings = {"path": str(files["llama"][0]), "vocab_size": 400} | settings
        return Recipe(model=ModelConfig(init_from="imports/x"), tokenizer=TokenizerConfig(**settings))

    pieces = Tokenizer(files["llama"][0])
    own = hash_rows(pieces.vocabulary)
    assert Tokenizer.of(recipe(sha256=own)).sha256 == pieces.sha256 != own
    with pytest.raises(
        ConfigError, match=rf"{pieces.vocabulary.size} pieces and 7 symbols.*set it to {pieces.size} or"
    ):
        Tokenizer.of(recipe(vocab_size=pieces.size - 1))
    both = rf"llama.model \(pieces {own[:12]}\) is not that .*init_from = 'imports/x' \(pieces 0123"
    with pytest.raises(ConfigError, match=both):
        Tokenizer.of(recipe(sha256="0123"))
    with pytest.raises(ConfigError, match=r"set tokenizer\.eos"):
        Tokenizer.of(recipe(path=str(files["qwen"][0])))


@pytest.mark.parametrize("content", ("{", "{}", '{"model": {}}', '{"config": {}, "vocab": []}', "{\x00\xff"))
def test_a_json_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"tokenizer.json cannot be read by tokenizers 0\.") as error:
        Tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_without_the_library(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs tokenizers: pip install 'dsmoe-vl\[hf\]'"):
        Tokenizer(*files["qwen"])
    Tokenizer(*files["llama"])


def test_the_hash_is_of_the_pieces_not_of_the_file(files, tmp_path):
    found = json.loads(files["qwen"][0].read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(found, indent=4))
    assert Tokenizer(tmp_path / "tokenizer.json").sha256 == Tokenizer(*files["qwen"]).sha256
    found["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    assert Tokenizer(tmp_path / "tokenizer.json").sha256 != Tokenizer(*files["qwen"]).sha256


def test_a_segment_after_its_first_piece():
    cells = np.arange(2, dtype=np.int32)
    pictures = [Picture(np.zeros((2, 3), np.uint8), (1, 2), 0.0, cells, frame) for frame in (-1, 2)]
    row = np.array([5, 5, 6], np.int32)
    segment = Segment(1, row, row + 10, np.ones(3, np.int32), pictures, pair=7)
    assert segment.after(()) is segment
    after = segment.after((9,))
    assert after.tokens.tolist() == [9, 5, 5, 6] and after.labels.tolist() == [IGNORE, 15, 15, 16]
    assert after.modality.tolist() == [Modality.TEXT, 1, 1, 1] and (after.task, after.pair) == (1, 7)
    assert [picture.cell_token.tolist() for picture in after.pictures] == [[1, 2], [1, 2]]
    assert [picture.frame_token for picture in after.pictures] == [-1, 3]
    assert {array.dtype for array in (after.tokens, after.labels, after.modality)} == {np.dtype(np.int32)}
    assert cells.tolist() == [0, 1]  # of the picture that other tasks read too
