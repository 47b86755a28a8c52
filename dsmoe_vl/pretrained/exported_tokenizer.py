"""The tokenizer of an exported model, for transformers: the run's own file, and a tokenizer.json that gives its ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from dsmoe_vl.config.control_symbols import CONTROL_SYMBOLS
from dsmoe_vl.data.sentencepiece_model import SentencePieceModel
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.files import write_atomically

_NASTY = ("", " ", "  two  spaces ", "line\nbreak\ttab", "naïve café", "日本語 🦊", "\u2581 x", "aaaaaaa bbbbbbb")


def write_tokenizer(tokenizer: Tokenizer, output: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Copy the run's file, and write tokenizer.json for PreTrainedTokenizerFast, with our symbols in it.

    `settings`: keys of tokenizer_config.json. Returns what was lost, in words.
    """
    vocabulary, path = tokenizer.vocabulary, Path(tokenizer.path)
    lost: tuple[str, ...] = ()
    if isinstance(vocabulary, SentencePieceModel):
        shutil.copyfile(path, output / vocabulary.file_name)
        found = _of_sentencepiece(vocabulary.model)
        try:
            differing = _first_difference(vocabulary.model, json.dumps(found, ensure_ascii=False))
        except ImportError:
            differing, lost = None, ("tokenizer.json: not compared with the run's own, as tokenizers is not installed",)
        if differing is not None:
            return (f"tokenizer.json: it would give other ids for {differing!r}; use {vocabulary.file_name}",)
    else:
        found = json.loads(path.read_text(encoding="utf-8"))
    found["added_tokens"] = (found.get("added_tokens") or []) + [_added(name_of(tokenizer, row), row)
                                                                 for row in tokenizer.new_rows]  # fmt: skip
    write_atomically(output / "tokenizer.json", json.dumps(found, ensure_ascii=False))
    rows = {"pad": tokenizer.pad, "unk": tokenizer.unk, "bos": tokenizer.bos, "eos": tokenizer.eos}
    names = {f"{name}_token": name_of(tokenizer, row) for name, row in rows.items() if row is not None}
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_atomically(
        output / "tokenizer_config.json",
        json.dumps(common | names | dict(settings), indent=2, ensure_ascii=False) + "\n",
    )
    return lost


def name_of(tokenizer: Tokenizer, row: int) -> str:
    """The piece of a row, or the symbol of ours that is there instead of one."""
    own = (symbol for symbol in CONTROL_SYMBOLS if tokenizer.control(symbol) == row)
    return tokenizer.vocabulary.piece(row) or next(own, "<unk>")


def _added(name: str, row: int) -> dict[str, Any]:
    return {
        "id": row, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }  # fmt: skip


def _of_sentencepiece(model: SentencePieceProcessor) -> dict[str, Any]:
    """Of a BPE model. Its merges are all splits of a piece into two pieces, in the order of the pieces' scores."""
    pieces = [model.id_to_piece(row) for row in range(model.get_piece_size())]
    special = [row for row in range(len(pieces)) if model.IsControl(row) or model.IsUnknown(row)]
    normal = [row for row in range(len(pieces)) if row not in set(special) and not model.IsByte(row)]
    known = {pieces[row] for row in normal}
    merges = []
    for row in sorted(normal, key=model.get_score, reverse=True):
        piece = pieces[row]
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [list(split) for split in splits if known.issuperset(split)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [_added(pieces[row], row) for row in special],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "ignore_merges": False, "vocab": {piece: row for row, piece in enumerate(pieces)}, "merges": merges,
        },
    }  # fmt: skip


def _first_difference(model: SentencePieceProcessor, written: str) -> str | None:
    """The first of some texts, made of the model's own pieces too, that gets other ids. Raises ImportError."""
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_str(written)
    fast.encode_special_tokens = True
    spoken = [model.id_to_piece(row) for row in range(model.get_piece_size())
              if not (model.IsControl(row) or model.IsByte(row) or model.IsUnknown(row))]  # fmt: skip
    joined = ("".join(spoken[at::97][:50]).replace("\u2581", " ") for at in range(97))
    for text in (*_NASTY, *joined):
        if fast.encode(text, add_special_tokens=False).ids != model.encode(text):
            return text[:40]
    return None
