"""What a file with a tokenizer knows: its pieces, and text <-> ids. The file's content says of which kind it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from dsmoe_vl.data.sentencepiece_model import SentencePieceModel
from dsmoe_vl.data.tokenizer_json import TokenizerJson
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import require_regular

FILE_NAMES = (SentencePieceModel.file_name, TokenizerJson.file_name)
TRAIN_HINT = "train one with `python -m data_tools.tokenizer train --data SHARDS --output tokenizer.model`"


class Vocabulary(Protocol):
    """Pieces have the ids 0 to `size` - 1. `encode` and `decode` take well-formed text."""

    file_name: str  # of its copies
    size: int
    pad: int | None
    unk: int | None
    bos: int | None
    eos: int | None
    reserved: frozenset[int]  # of pieces that no text consists of: control symbols, unused ones, ids without a piece

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any at its beginning or end. Some kinds give reserved ones for what names them."""

    def places(self, text: str, rows: Collection[int]) -> Iterator[tuple[int, int]]:
        """First character and the one after the last of all that `encode` makes one of `rows`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""

    def row(self, piece: str) -> int | None:
        """The id of a piece; None if there is none of that name."""

    def piece(self, row: int) -> str:
        """The name of a piece; empty for a row that has none."""

    def is_spare(self, row: int) -> bool:
        """Whether a piece may stand for a symbol of ours: text has it only where it names the piece."""

    def described(self) -> Iterator[str]:
        """What each row means, in order."""


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read a SentencePiece model or a tokenizer.json. Raises ConfigError if `path` is neither."""
    if not str(path):
        raise ConfigError(f"tokenizer.path is empty; {TRAIN_HINT}")
    try:
        with require_regular(Path(path)).open("rb") as file:
            is_json = file.read(64).lstrip().startswith(b"{")
    except FileNotFoundError:
        raise ConfigError(f"tokenizer {path}: no such file; {TRAIN_HINT}") from None
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: {error.strerror}; {TRAIN_HINT}") from None
    if is_json:
        return TokenizerJson(path)
    try:
        return SentencePieceModel(path)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"tokenizer {path} is not a SentencePiece model, and not a tokenizer.json either; {TRAIN_HINT}"
        ) from error
