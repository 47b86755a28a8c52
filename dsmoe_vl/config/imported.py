"""The settings that follow from imported weights: `model.init_from = DIR` fills them into a recipe.

model.json has tables as a recipe's, and under "defaults" those that a recipe may set otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsmoe_vl.errors import ConfigError

MODEL_NAME = "model.json"
ORIGIN_NAME = "origin.json"  # of what each tensor was made
DEFAULTS = "defaults"
# Settings that the recipe may have otherwise. Whether the tokenizer at that path is the right one, its hash says.
_OWN = ("tokenizer.path", "tokenizer.bos", "tokenizer.eos")


def fill_in(table: dict[str, Any], place: str) -> list[str]:
    """Add the settings of `model.init_from` to a recipe's table, in place: their keys. Without init_from: none.

    Raises ConfigError if the folder has none, or if the recipe has others.
    """
    folder = table.get("model", {}).get("init_from") if isinstance(table.get("model"), dict) else None
    if not isinstance(folder, str) or not folder:
        return []
    file = Path(folder).expanduser() / MODEL_NAME
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"model.init_from = {folder!r} in {place}: {file} cannot be read: {reason}. Name a folder that "
            "launch/import_hf.py wrote"
        ) from None
    _add_missing(table, found.pop(DEFAULTS, {}))
    tokenizer = found.get("tokenizer")
    if isinstance(tokenizer, dict) and "path" in tokenizer:
        tokenizer["path"] = str(file.parent / tokenizer["path"])
    return _merge(table, found, "", file, place)


def imported_roots(folder: str) -> frozenset[str]:
    """The first words of the names of the tensors in a folder, such as "vision"; none if it cannot be read."""
    try:
        found = json.loads((Path(folder).expanduser() / ORIGIN_NAME).read_text(encoding="utf-8"))["tensors"]
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
    return frozenset(name.partition(".")[0] for name in found)


def _add_missing(table: dict[str, Any], defaults: dict[str, Any]) -> None:
    for key, value in defaults.items():
        own = table.setdefault(key, {} if isinstance(value, dict) else value)
        if isinstance(value, dict) and isinstance(own, dict):
            _add_missing(own, value)


def _merge(table: dict[str, Any], found: dict[str, Any], prefix: str, file: Path, place: str) -> list[str]:
    keys = []
    for key, value in found.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{name} in {place} must be a table: write [{name}]")
            keys += _merge(inner, value, f"{name}.", file, place)
            continue
        if name in _OWN and key in table:
            continue
        if table.get(key, value) != value:
            raise ConfigError(
                f"{name} = {table[key]!r} in {place}, but the weights of model.init_from have {value!r} ({file}): "
                "remove the key"
            )
        table[key] = value
        keys.append(name)
    return keys
