"""The tokenizer of a folder of another maker, with what the files beside it say of its use.

Where a folder has both kinds, its tokenizer.model is read, unless it is none of SentencePiece's or pieces were added to
the tokenizer.json since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.config.control_symbols import CONTROLS, ControlsConfig
from dsmoe_vl.config.recipe import TokenizerConfig
from dsmoe_vl.config.suggest import did_you_mean
from dsmoe_vl.data.sentencepiece_model import SentencePieceModel
from dsmoe_vl.data.tokenizer import Tokenizer, hash_rows
from dsmoe_vl.data.tokenizer_json import TokenizerJson
from dsmoe_vl.data.vocabulary import read_vocabulary
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.pretrained.mapping import Target
from dsmoe_vl.pretrained.source import SourceFolder

_MULTIPLE = 64  # of the rows of a table that must grow: odd sizes are slow on GPUs
_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
_SHOWN = 5  # names in a message
_CHUNK = 2**14  # rows that are added up at once
_BEGINS_WITH_BOS = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")  # unless they say


@dataclass(frozen=True)
class FoundTokenizer:
    """`old_rows`: of the embedding in the folder; `rows`: of ours. `unread`: what files beside the tokenizer's add to
    it and is not read, for a warning."""

    tokenizer: Tokenizer
    settings: TokenizerConfig
    old_rows: int
    rows: int
    unread: str = ""

    def table(self) -> dict[str, Any]:
        """The recipe's settings; `path` is relative to the folder that gets a copy."""
        kept = {key: value for key, value in asdict(self.settings).items() if value and key != "controls"}
        controls = {name: piece for name, piece in asdict(self.settings.controls).items() if piece}
        return kept | ({"controls": controls} if controls else {})

    def grown(self, target: Target) -> Target:
        """A target of one row a piece: with rows for what has none."""
        pieces = self.tokenizer.vocabulary.size
        new = range(pieces, self.rows if self.rows > self.old_rows else self.tokenizer.size)
        if not new:
            return target

        def make(found: Sequence[Tensor]) -> Tensor:
            table = target.make(found)
            if len(table) != self.old_rows:  # whoever writes it says that it is not what config.json says
                return table
            return with_mean_rows(table, new, pieces, self.rows)

        how = f"{target.how}; rows {new[0]} to {new[-1]} are new: each is the mean of the first {pieces}"
        return replace(target, make=make, how=how)

    def __str__(self) -> str:
        tokenizer, settings = self.tokenizer, self.settings
        new = len(tokenizer.new_rows)
        begin = f"segments begin with {settings.bos}" if settings.bos else "segments begin with no piece of their own"
        return (
            f"{tokenizer.vocabulary.size:,} pieces of {settings.path}, {new} symbols in rows after them; {begin}, "
            f"texts end with {tokenizer.vocabulary.piece(tokenizer.eos)}"
        )


def with_mean_rows(table: Tensor, new: range, pieces: int, rows: int) -> Tensor:
    """`table` [V, D] with `rows` rows, of which those in `new` are the mean of its first `pieces`, of float64 sums."""
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    for part in table[:pieces].split(_CHUNK):
        total += part.double().sum(0)
    result = table.new_empty(rows, table.shape[1])
    result[: len(table)] = table
    result[new.start : new.stop] = (total / pieces).to(table.dtype)
    return result


def find_tokenizer(
    folder: SourceFolder, old_rows: int, controls: Mapping[str, str], symbols: Mapping[str, int] = MappingProxyType({})
) -> FoundTokenizer | None:
    """The tokenizer of a folder whose embedding has `old_rows` rows; None if it has none. `controls`: pieces that stand
    for our symbols, by name; `symbols`: their ids in the folder's own model, where `controls` say nothing. Raises
    ConfigError."""
    for name, piece in controls.items():
        if name not in CONTROLS or not piece:
            advice = "name a piece" if name in CONTROLS else did_you_mean(name, CONTROLS)
            raise ConfigError(f"--controls {name}={piece}: {advice}")
    path = _chosen(folder.folder)
    if path is None:
        return None
    said = folder.json(_CONFIG, needed=False)
    vocabulary = read_vocabulary(path)
    known = {name: vocabulary.piece(row) for name, row in symbols.items() if row < vocabulary.size
             and vocabulary.is_spare(row)}  # fmt: skip
    settings = TokenizerConfig(controls=ControlsConfig(**(known | dict(controls))))
    bare = Tokenizer(path, settings)
    if bare.vocabulary.size > old_rows:
        raise ConfigError(
            f"{path} has {bare.vocabulary.size} pieces, but vocab_size = {old_rows} in {folder.place}: it belongs "
            "to other weights, or pieces were added to it after they were trained; put the weights' own there"
        )
    eos = _eos(said, folder.config.get("text_config") or folder.config, bare)
    if not eos and bare.vocabulary.eos is None:
        raise ConfigError(
            f"{path}: no file beside it names a reserved piece that ends a text: add eos_token to tokenizer_config.json"
        )
    settings = replace(settings, bos=_bos(path, said, bare), eos=eos)
    tokenizer = Tokenizer(path, settings)
    rows = old_rows if tokenizer.size <= old_rows else -(-tokenizer.size // _MULTIPLE) * _MULTIPLE
    name = tokenizer.vocabulary.file_name
    settings = replace(settings, path=name, vocab_size=rows, sha256=hash_rows(tokenizer.vocabulary))
    return FoundTokenizer(tokenizer, settings, old_rows, rows, _unread(folder, said, tokenizer))


def _unread(folder: SourceFolder, said: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Pieces that transformers adds to a tokenizer.model from files beside it, in words.

    It cuts texts at them before SentencePiece sees these, with rules of its own, so only its tokenizer.json has all.
    """
    vocabulary = tokenizer.vocabulary
    if not isinstance(vocabulary, SentencePieceModel):
        return ""
    decoder = said.get("added_tokens_decoder") or {}
    files = {
        _ADDED: folder.json(_ADDED, needed=False),
        _CONFIG: {_content(piece): int(row) for row, piece in decoder.items() if str(row).isdigit()},
    }
    lacking = {file: [name for name, row in found.items() if vocabulary.row(name) != row]
               for file, found in files.items()}  # fmt: skip
    file = max(lacking, key=lambda name: len(lacking[name]))
    if not lacking[file]:
        return ""
    names = ", ".join(lacking[file][:_SHOWN]) + (", ..." if len(lacking[file]) > _SHOWN else "")
    return (
        f"{folder.folder / file} adds {len(lacking[file])} pieces to tokenizer.model: {names}. They are not read: "
        "texts are not cut at them, they end no text, and their rows may be given to symbols of ours. If they matter, "
        "write a tokenizer.json, which is read whole: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) in "
        "transformers"
    )


def _chosen(folder: Path) -> Path | None:
    model, as_json = folder / SentencePieceModel.file_name, folder / TokenizerJson.file_name
    if not as_json.is_file() or not model.is_file():
        return next((path for path in (model, as_json) if path.is_file()), None)
    try:
        size = SentencePieceModel(model).size
    except (RuntimeError, OSError):  # of tiktoken
        return as_json
    added = _read(as_json).get("added_tokens") or ()
    return as_json if any(piece.get("id", 0) >= size for piece in added if isinstance(piece, dict)) else model


def _bos(path: Path, said: Mapping[str, Any], bare: Tokenizer) -> str:
    """What transformers puts before a text: tokenizer_config.json says it, else the post-processor, else the class."""
    name = _content(said.get("bos_token"))
    if not name and isinstance(bare.vocabulary, SentencePieceModel) and bare.bos is not None:
        name = bare.vocabulary.model.id_to_piece(bare.bos)
    wanted = said.get("add_bos_token")
    if wanted is None and isinstance(bare.vocabulary, TokenizerJson):
        first = _first_of_template(_read(path).get("post_processor"))
        if first:
            return first
    if wanted is None:
        wanted = said.get("tokenizer_class") in _BEGINS_WITH_BOS
    return name if wanted and bare.vocabulary.row(name) is not None else ""


def _first_of_template(processor: Any) -> str:
    """The special piece with which a post-processor begins every text."""
    if not isinstance(processor, dict):
        return ""
    inner = processor.get("processors")
    if isinstance(inner, list):
        return next((name for name in map(_first_of_template, inner) if name), "")
    first = (processor.get("single") or [{}])[0]
    return str(first.get("SpecialToken", {}).get("id", "")) if isinstance(first, dict) else ""


def _eos(said: Mapping[str, Any], config: Mapping[str, Any], bare: Tokenizer) -> str:
    """The piece that tokenizer_config.json names, else that of config.json's id; empty where the file's own is it."""
    vocabulary = bare.vocabulary
    ids = config.get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    of_model = vocabulary.piece(first) if isinstance(first, int) and vocabulary.eos is None else ""
    for name in (_content(said.get("eos_token")), of_model):
        row = vocabulary.row(name) if name else None
        if row is not None and row != vocabulary.eos and vocabulary.is_spare(row):
            return name
    return ""


def _content(piece: Any) -> str:
    """Of a special piece, which is a string or has its text among other settings."""
    return str(piece.get("content") or "") if isinstance(piece, dict) else str(piece or "")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}
