"""Text <-> token ids, with a SentencePiece model that has the control symbols of this project."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import require_regular

CONTROL_SYMBOLS = ("<image>", "<video>", "<frame>", "<embed>", *(spec.symbol for spec in TASKS))

_RESERVED_IDS = {"pad": 0, "unk": 1, "bos": 2, "eos": 3}
_TRAIN_HINT = "train one with `python -m data_tools.tokenizer train --data SHARDS --output tokenizer.model`"


class Tokenizer:
    """A SentencePiece model file. Pickled as its path; a worker process reads the file again.

    Raises ConfigError if the file is missing, is not a model, or lacks a reserved id or a control symbol.
    """

    pad = _RESERVED_IDS["pad"]
    unk = _RESERVED_IDS["unk"]
    bos = _RESERVED_IDS["bos"]
    eos = _RESERVED_IDS["eos"]

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._model = _load(path)
        for name, expected in _RESERVED_IDS.items():
            found = getattr(self._model, f"{name}_id")()
            if found != expected:
                raise ConfigError(f"{path}: {name}_id is {found}, must be {expected}; {_TRAIN_HINT}")
        self._controls = {symbol: self._model.piece_to_id(symbol) for symbol in CONTROL_SYMBOLS}
        missing = [symbol for symbol, row in self._controls.items() if not self._model.IsControl(row)]
        if missing:
            raise ConfigError(f"{path}: no control symbols {', '.join(missing)}; {_TRAIN_HINT}")
        self._silent = frozenset(row for row in range(self.size) if self._model.IsControl(row))
        self.sha256 = _hash_pieces(self._model)

    @property
    def size(self) -> int:
        """Pieces of the vocabulary, control symbols included."""
        return self._model.get_piece_size()

    @property
    def spoken(self) -> list[int]:
        """All ids except control symbols: those that text consists of."""
        return [row for row in range(self.size) if row not in self._silent]

    def require_fit(self, vocab_size: int) -> None:
        """Raise ConfigError if an embedding table of `vocab_size` rows is too small."""
        if self.size > vocab_size:
            raise ConfigError(
                f"tokenizer.vocab_size = {vocab_size} in the recipe, but {self.path} has {self.size} pieces: "
                f"set it to {self.size} or more, or train a tokenizer with --vocab-size {vocab_size}"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. A literal "<image>" in it becomes ordinary pieces, never a control id."""
        well_formed = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be UTF-8
        return self._model.encode(well_formed)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Control ids and ids from `size` on, the padding of the embedding table, are left out."""
        return self._model.decode([row for row in map(int, ids) if 0 <= row < self.size and row not in self._silent])

    def control(self, symbol: str) -> int:
        """Id of one of CONTROL_SYMBOLS."""
        return self._controls[symbol]

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        return Tokenizer, (self.path,)


def _load(path: str | Path) -> SentencePieceProcessor:
    if not str(path):
        raise ConfigError(f"tokenizer.path is empty; {_TRAIN_HINT}")
    try:
        require_regular(Path(path))
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: {error.strerror}; {_TRAIN_HINT}") from None
    if not Path(path).is_file():
        raise ConfigError(f"tokenizer {path}: no such file; {_TRAIN_HINT}")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"tokenizer {path} is not a SentencePiece model; {_TRAIN_HINT}") from error


def _hash_pieces(model: SentencePieceProcessor) -> str:
    """Hex sha256 of the type and text of every piece, in order: of the meaning of each embedding row."""
    digest = hashlib.sha256()
    for row in range(model.get_piece_size()):
        kind = (model.IsControl(row), model.IsUnknown(row), model.IsByte(row), model.IsUnused(row))
        digest.update(f"{kind}\t{model.id_to_piece(row)}\n".encode())
    return digest.hexdigest()
