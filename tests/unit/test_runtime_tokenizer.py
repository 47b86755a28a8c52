import hashlib
import pickle
import re
from pathlib import Path

import pytest
import sentencepiece

from dsmoe_vl.config.control_symbols import CONTROL_SYMBOLS
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import ConfigError


def train(folder: Path, **options: object) -> Path:
    """A byte-fallback model over a few sentences."""
    sentences = [
        f"a {colour} {shape} left of a {colour} cube" for colour in ("red", "blue") for shape in ("ball", "cone")
    ]
    settings: dict[str, object] = {
        "vocab_size": 300,
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "control_symbols": list(CONTROL_SYMBOLS),
        "hard_vocab_limit": False,
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(folder / "tokenizer"), **(settings | options)
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    "text", ["a red ball", "", "  tabs\tand\nnewlines ", "émoji 🙂", "a\0b", "<image></s><caption>"]
)
def test_text_survives_and_never_forges_a_control_symbol(model: Path, text: str) -> None:
    tokenizer = Tokenizer(model)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    reserved = {tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos, *map(tokenizer.control, CONTROL_SYMBOLS)}
    assert not reserved & set(ids)


def test_lone_surrogates_are_replaced(model: Path) -> None:
    tokenizer = Tokenizer(model)
    assert tokenizer.decode(tokenizer.encode("red \ud800 ball")) == "red ? ball"


def test_control_ids_and_unused_rows_are_silent(model: Path) -> None:
    tokenizer = Tokenizer(model)
    ids = [
        tokenizer.bos,
        tokenizer.control("<caption>"),
        *tokenizer.encode("a red ball"),
        tokenizer.eos,
        tokenizer.size,
    ]
    assert tokenizer.decode(ids) == "a red ball"


def test_pickles_by_path(model: Path) -> None:
    tokenizer = Tokenizer(model)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.sha256 == tokenizer.sha256 == Tokenizer(model).sha256
    assert copy.encode("a blue cone") == tokenizer.encode("a blue cone")


def test_hash_tells_vocabularies_apart(model: Path, tmp_path: Path) -> None:
    assert Tokenizer(train(tmp_path, vocab_size=290)).sha256 != Tokenizer(model).sha256


@pytest.mark.parametrize(
    "options",
    [
        {"control_symbols": []},
        {"control_symbols": [], "user_defined_symbols": list(CONTROL_SYMBOLS)},
    ],
)
def test_symbols_that_a_model_lacks_are_rows_after_it(tmp_path: Path, options: dict[str, object]) -> None:
    tokenizer = Tokenizer(train(tmp_path, **options))
    rows = [tokenizer.control(symbol) for symbol in CONTROL_SYMBOLS]
    assert rows == list(tokenizer.new_rows) == list(range(tokenizer.vocabulary.size, tokenizer.size))
    text = "".join(CONTROL_SYMBOLS)
    assert tokenizer.decode(tokenizer.encode(text)) == text and not set(rows) & set(tokenizer.encode(text))


def test_one_of_ours_means_what_it_always_did(model: Path) -> None:
    """Ids, text and hash are those of SentencePiece, and of checkpoints of before."""
    tokenizer, plain = Tokenizer(model), sentencepiece.SentencePieceProcessor(model_file=str(model))
    digest = hashlib.sha256()
    for row in range(plain.get_piece_size()):
        kind = (plain.IsControl(row), plain.IsUnknown(row), plain.IsByte(row), plain.IsUnused(row))
        digest.update(f"{kind}\t{plain.id_to_piece(row)}\n".encode())
    assert tokenizer.sha256 == digest.hexdigest()
    assert (tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.begin) == (0, 1, 2, 3, ())
    assert tokenizer.size == plain.get_piece_size() and not tokenizer.new_rows
    assert tokenizer.spoken == [row for row in range(plain.get_piece_size()) if not plain.IsControl(row)]


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    text = tmp_path / "text.model"
    text.write_text("hello")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        Tokenizer(text)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none.model'}: no such file")):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(ConfigError, match=r"tokenizer\.path is empty"):
        Tokenizer("")
