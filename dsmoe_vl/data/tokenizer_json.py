"""A tokenizer.json of the library `tokenizers` (Qwen, Llama 3, OLMoE, SmolLM, ...): byte-level BPE and others.

Names of special pieces stay text: `encode_special_tokens` is set after every load, as the file does not keep it. Models
that have such names among their own pieces, as unigram ones do, may still find them: `tokenizer.py` cuts them apart.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsmoe_vl.errors import ConfigError


class TokenizerJson:
    """See `vocabulary.py: Vocabulary`. Raises ConfigError for a file that cannot be read, or without the library."""

    file_name = "tokenizer.json"

    def __init__(self, path: str | Path) -> None:
        text = Path(path).read_bytes()
        self._library = _load(path, text)
        pieces = self._library.get_vocab(with_added_tokens=True)
        self.size = max(pieces.values(), default=-1) + 1
        added = self._library.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = frozenset(row for row, piece in added.items() if piece.special)
        self.unk = self._unknown(text)
        self.pad: int | None = None  # the recipe names these
        self.bos: int | None = None
        self.eos: int | None = None
        holes = frozenset(range(self.size)) - set(pieces.values())
        self.reserved = (self._special | holes) - {self.unk}

    def _unknown(self, text: bytes) -> int | None:
        model = self._library.model
        if hasattr(model, "unk_token"):
            return None if model.unk_token is None else self._library.token_to_id(model.unk_token)
        found: int | None = json.loads(text)["model"].get("unk_id")  # of a unigram model
        return found

    def encode(self, text: str) -> list[int]:
        """Without what the file's post-processor adds."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def places(self, text: str, rows: Collection[int]) -> Iterator[tuple[int, int]]:
        """As the library reports them."""
        found = self._library.encode(text, add_special_tokens=False)
        for row, span in zip(found.ids, found.offsets, strict=True):
            if row in rows:
                yield span

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        text: str = self._library.decode(list(ids), skip_special_tokens=False)
        return text

    def row(self, piece: str) -> int | None:
        """The library's answer."""
        found: int | None = self._library.token_to_id(piece)
        return found

    def piece(self, row: int) -> str:
        """The library's name."""
        return self._library.id_to_token(row) or "" if row >= 0 else ""

    def is_spare(self, row: int) -> bool:
        """Added pieces, special or not, but for the unknown one."""
        return row in self._added and row != self.unk

    def described(self) -> Iterator[str]:
        """Whether it is special, and text of every piece."""
        for row in range(self.size):
            yield f"json {row in self._special}\t{self._library.id_to_token(row)}\n"


def _load(path: str | Path, text: bytes) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            f"tokenizer {path} is a tokenizer.json: reading it needs tokenizers: pip install 'dsmoe-vl[hf]'"
        ) from None
    try:
        library = tokenizers.Tokenizer.from_str(text.decode("utf-8"))
    except Exception as error:  # the library raises nothing more precise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"tokenizer {path} cannot be read by tokenizers {tokenizers.__version__}: {reason}: name a tokenizer.json "
            "as Hugging Face's libraries write it"
        ) from None
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    return library
