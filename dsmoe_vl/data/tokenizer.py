"""Text <-> token ids, with the control symbols of this project, from a tokenizer of ours or of another maker.

Control symbols never need a place in the file: those that it does not have are rows after its last piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from dsmoe_vl.config.control_symbols import CONTROLS, SPEECH_CONTROLS
from dsmoe_vl.config.recipe import Recipe, TokenizerConfig
from dsmoe_vl.data.vocabulary import Vocabulary, read_vocabulary
from dsmoe_vl.errors import ConfigError

_BLANKS = ("\u2581", "\u0120")  # a blank in the pieces of SentencePiece, and in those of bytes
_NO_SETTINGS = TokenizerConfig()


class Tokenizer:
    """A tokenizer file. Pickled as its path and settings; a worker process reads the file again.

    `pad`, `unk`, `bos`, `eos`: ids; bos may be None, and pad is some other reserved one where the file has none.
    `begin`: what every segment begins with, (bos,) or nothing. `settings`: of the recipe, of which only names of pieces
    are used. `hears`: of a model with a speech encoder, which has symbols of its own.

    Raises ConfigError if the file is missing, cannot be read, or lacks a piece that `settings` names.
    """

    def __init__(
        self,
        path: str | Path,
        settings: TokenizerConfig = _NO_SETTINGS,
        vocabulary: Vocabulary | None = None,
        hears: bool = False,
    ) -> None:
        """`vocabulary`: of the file, if it was read before."""
        self.path, self._settings, self._hears = str(path), settings, hears
        self.vocabulary = vocabulary = vocabulary or read_vocabulary(path)
        self._rows = vocabulary.size
        self._own: dict[str, int] = {}  # symbols that the file does not have, or has under other names
        self.unk = self._appended("<unk>") if vocabulary.unk is None else vocabulary.unk
        symbols = CONTROLS | SPEECH_CONTROLS if hears else CONTROLS
        self._controls = {symbol: self._control(name, symbol) for name, symbol in symbols.items()}
        self.bos = self._named("bos", settings.bos) if settings.bos else vocabulary.bos
        self.begin = (self.bos,) if settings.bos and self.bos is not None else ()
        self._eos = self._named("eos", settings.eos) if settings.eos else vocabulary.eos
        self.pad = next(row for row in (vocabulary.pad, self._eos, self.unk) if row is not None)
        own = {*self._own.values(), *self.begin} | ({self._eos} if self._eos is not None else set())
        self._silent = vocabulary.reserved | own
        if len(set(self._controls.values())) < len(self._controls):
            raise ConfigError(f"tokenizer.controls names a piece of {path} twice: each symbol needs one of its own")
        self.sha256 = hash_rows(vocabulary, self._own)

    @classmethod
    def of(cls, recipe: Recipe) -> Tokenizer:
        """The recipe's, with all that training needs. Raises ConfigError, also if it has more rows than the embedding
        table, or other pieces than the weights of `model.init_from`."""
        settings = recipe.tokenizer
        vocabulary = read_vocabulary(settings.path)
        if settings.sha256 and (found := hash_rows(vocabulary)) != settings.sha256:
            raise ConfigError(
                f"tokenizer {settings.path} (pieces {found[:12]}) is not that of the weights of "
                f"model.init_from = {recipe.model.init_from!r} (pieces {settings.sha256[:12]}): leave tokenizer.path "
                "out to take the one in that folder, or import the weights again"
            )
        tokenizer = cls(settings.path, settings, vocabulary, recipe.model.hears)
        tokenizer.require_fit(settings.vocab_size)
        tokenizer._require_eos()
        return tokenizer

    @property
    def eos(self) -> int:
        """Id of the end of a text. Raises ConfigError if neither the file nor the recipe says which it is."""
        return self._require_eos()

    @property
    def size(self) -> int:
        """Rows of the vocabulary, control symbols included."""
        return self._rows

    @property
    def new_rows(self) -> range:
        """Rows that the file has no piece for: of symbols of ours."""
        return range(self.vocabulary.size, self._rows)

    def words(self) -> dict[str, int]:
        """The rows of pieces that begin a word, by their text: those with a blank before it."""
        found: dict[str, int] = {}
        for row in self.spoken:
            if self.vocabulary.piece(row).startswith(_BLANKS):
                word = self.vocabulary.decode([row]).strip()
                if word and "\N{REPLACEMENT CHARACTER}" not in word:  # blanks alone; a part of a letter
                    found.setdefault(word, row)
        return found

    @property
    def spoken(self) -> list[int]:
        """All ids except control symbols: those that text consists of."""
        return [row for row in range(self.size) if row not in self._silent]

    def require_fit(self, vocab_size: int) -> None:
        """Raise ConfigError if an embedding table of `vocab_size` rows is too small."""
        if self.size > vocab_size:
            new = f" and {len(self.new_rows)} symbols after them" if self.new_rows else ""
            raise ConfigError(
                f"tokenizer.vocab_size = {vocab_size} in the recipe, but {self.path} has {self.vocabulary.size} pieces"
                f"{new}: set it to {self.size} or more, or train a tokenizer with --vocab-size {vocab_size}"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. A literal "<image>" in it becomes ordinary pieces, never a control id."""
        return self._ordinary(text.encode("utf-8", "replace").decode("utf-8"))  # a lone surrogate cannot be UTF-8

    def _ordinary(self, text: str) -> list[int]:
        """Where the vocabulary finds a control id, the text that names it is cut in the middle.

        There is a space then, if the vocabulary is of those that put one before every text."""
        ids = self.vocabulary.encode(text)
        if self._silent.isdisjoint(ids):
            return ids
        spans = self.vocabulary.places(text, self._silent.intersection(ids))
        cuts = sorted({(first + end) // 2 for first, end in spans} - {0, len(text)})
        if not cuts:  # a control symbol of one letter
            return [self.unk if row in self._silent else row for row in ids]
        return [row for part in pairwise((0, *cuts, len(text))) for row in self._ordinary(text[slice(*part)])]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Control ids and ids from `size` on, the padding of the embedding table, are left out."""
        kept = [row for row in map(int, ids) if 0 <= row < self.size and row not in self._silent]
        return self.vocabulary.decode(kept)

    def control(self, symbol: str) -> int:
        """Id of a control symbol; one of speech only if the model hears."""
        return self._controls[symbol]

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, TokenizerConfig, None, bool]]:
        return Tokenizer, (self.path, self._settings, None, self._hears)

    def _control(self, name: str, symbol: str) -> int:
        """The piece that the recipe names, the control symbol of that name, or a new row. An ordinary piece of that
        name, such as an HTML tag in Gemma's, stays what it is."""
        piece = asdict(self._settings.controls)[name]
        if piece:
            self._own[symbol] = row = self._named(f"controls.{name}", piece)
            return row
        found = self.vocabulary.row(symbol)
        return found if found is not None and found in self.vocabulary.reserved else self._appended(symbol)

    def _appended(self, symbol: str) -> int:
        self._own[symbol] = row = self._rows
        self._rows += 1
        return row

    def _named(self, key: str, piece: str) -> int:
        row = self.vocabulary.row(piece)
        if row is None:
            raise ConfigError(f"tokenizer.{key} = {piece!r}: {self.path} has no such piece")
        if not self.vocabulary.is_spare(row):
            raise ConfigError(
                f"tokenizer.{key} = {piece!r} is a piece of {self.path} that texts consist of: name a reserved one, or "
                "leave the key out"
            )
        return row

    def _require_eos(self) -> int:
        if self._eos is None:
            raise ConfigError(
                f'tokenizer {self.path} does not say which piece ends a text: set tokenizer.eos, such as "</s>" or '
                '"<|endoftext|>"'
            )
        return self._eos


def hash_rows(vocabulary: Vocabulary, own: Mapping[str, int] | None = None) -> str:
    """Hex sha256 of the meaning of each embedding row: of a file's pieces, and of symbols of ours in rows of `own`."""
    digest = hashlib.sha256()
    for line in (*vocabulary.described(), *(f"{symbol}\t{row}\n" for symbol, row in (own or {}).items())):
        digest.update(line.encode())
    return digest.hexdigest()
