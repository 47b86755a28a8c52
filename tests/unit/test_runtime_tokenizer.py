import pickle
import re
from pathlib import Path

import pytest
import sentencepiece

from dsmoe_vl.data.tokenizer import CONTROL_SYMBOLS, Tokenizer
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
    ("options", "message"),
    [
        ({"control_symbols": []}, "no control symbols <image>"),
        ({"control_symbols": [], "user_defined_symbols": list(CONTROL_SYMBOLS)}, "no control symbols <image>"),
        ({"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2}, "pad_id is -1, must be 0"),
    ],
)
def test_refuses_a_model_of_another_kind(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = train(tmp_path, **options)
    with pytest.raises(ConfigError, match=message) as error:
        Tokenizer(path)
    assert str(path) in str(error.value)
    assert "data_tools.tokenizer train" in str(error.value)


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    text = tmp_path / "text.model"
    text.write_text("hello")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        Tokenizer(text)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none.model'}: no such file")):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(ConfigError, match=r"tokenizer\.path is empty"):
        Tokenizer("")
