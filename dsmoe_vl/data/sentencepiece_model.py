"""A SentencePiece model: `tokenizer.model`, trained here or by others (Llama 2, Mistral, Gemma, ...)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor


class SentencePieceModel:
    """See `vocabulary.py: Vocabulary`. Raises RuntimeError or OSError for a file that is none."""

    file_name = "tokenizer.model"

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        self.model = SentencePieceProcessor(model_file=self._path)
        self.size: int = self.model.get_piece_size()
        self.pad, self.unk, self.bos, self.eos = (
            None if row < 0 else row
            for row in (self.model.pad_id(), self.model.unk_id(), self.model.bos_id(), self.model.eos_id())
        )
        self.reserved = frozenset(
            row for row in range(self.size) if self.model.IsControl(row) or self.model.IsUnused(row)
        )

    def encode(self, text: str) -> list[int]:
        """A literal control symbol becomes ordinary pieces; only a user-defined piece is found in text."""
        return self.model.encode(text)

    def places(self, text: str, rows: Collection[int]) -> Iterator[tuple[int, int]]:
        """Of user-defined pieces, which are found by their letters."""
        names = (self.model.id_to_piece(row).replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for row in rows)
        for found in re.finditer("|".join(map(re.escape, sorted(names, key=len, reverse=True))), text):
            yield found.span()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return self.model.decode(list(ids))

    def row(self, piece: str) -> int | None:
        """SentencePiece answers with the unknown piece for what it does not have."""
        found = self.model.piece_to_id(piece)
        return found if self.model.id_to_piece(found) == piece else None

    def piece(self, row: int) -> str:
        """The library's name."""
        return self.model.id_to_piece(row) if 0 <= row < self.size else ""

    def is_spare(self, row: int) -> bool:
        """Control symbols, unused and user-defined pieces."""
        return row in self.reserved or row in self._user_defined()

    def _user_defined(self) -> frozenset[int]:
        """The library does not distinguish them, but the file does."""
        formats: Any = import_module("sentencepiece.sentencepiece_model_pb2")
        model = formats.ModelProto.FromString(Path(self._path).read_bytes())
        kind = formats.ModelProto.SentencePiece.USER_DEFINED
        return frozenset(row for row, piece in enumerate(model.pieces) if piece.type == kind)

    def described(self) -> Iterator[str]:
        """Type and text of every piece."""
        for row in range(self.size):
            is_kind = (self.model.IsControl, self.model.IsUnknown, self.model.IsByte, self.model.IsUnused)
            yield f"{tuple(test(row) for test in is_kind)}\t{self.model.id_to_piece(row)}\n"
