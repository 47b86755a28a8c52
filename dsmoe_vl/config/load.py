"""Reads TOML recipes and command-line overrides into the frozen dataclasses of `recipe.py`."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dsmoe_vl.config.bounds import shown_key
from dsmoe_vl.config.deepspeed_keys import TOP_LEVEL
from dsmoe_vl.config.imported import MODEL_NAME, fill_in
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.config.suggest import did_you_mean
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import require_regular

_SHIPPED = Path(__file__).resolve().parents[2] / "launch" / "recipes"
# Keys of files and folders, whose ~ is the home folder. `data.cache` is expanded where it is used: its default has one.
_PLACES = ("path", "directory", "init_from", "embedding_from")
_KEY = re.compile(r'(?:^|\.)((?:"[^"]*"|[^".])*)')  # between the dots of an override
_WHOLE = (["stages"], ["train"])  # a list outside a table; a table of tables, whose names are the user's
_KINDS = {int: "a whole number", float: "a number", str: "a string in quotes", bool: "true or false"}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with overrides of the form `section.key=value` applied in order.

    A value that is not valid TOML is taken as a string, so `run.name=first` needs no quotes. Raises ConfigError for a
    file that cannot be read, an unknown key or a value of the wrong type.
    """
    table = _read(path)
    recipe = recipe_from_table(table, str(path))
    for override in overrides:
        _apply(table, override)
        recipe = recipe_from_table(table, f"override {override!r}")
    if fill_in(table, str(path)):
        recipe = recipe_from_table(table, f"{table['model']['init_from']}/{MODEL_NAME}")
    return recipe


def recipe_from_table(table: dict[str, Any], place: str) -> Recipe:
    """A Recipe from nested dicts. `place` (a file or an override) appears in ConfigErrors."""
    return _dataclass(Recipe, table, "", place)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(require_regular(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = [os.path.relpath(recipe) for recipe in sorted(_SHIPPED.glob("*.toml"))]
        raise ConfigError(f"recipe {path} does not exist. Shipped recipes: {', '.join(shipped) or 'none'}.") from None
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}. Name a TOML file.") from None
    except ValueError as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from None


def _apply(table: dict[str, Any], override: str) -> None:
    """Apply one override to `table`, in place."""
    dotted, equals, text = override.partition("=")
    parts = [part.strip('"') for part in _KEY.findall(dotted.strip())]  # of train."layers.0.*".freeze: three
    if not equals or not all(parts) or (len(parts) < 2 and parts not in _WHOLE):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, as in run.steps=200")
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {part} is not a table. Override all of it, or edit the recipe.")
    table[parts[-1]] = _override_value(text.strip(), override)


def _override_value(text: str, override: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if not text or text[0] in "\"'[{":
            raise ConfigError(f"override {override!r} has no valid TOML value after the =: {error}") from None
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _dataclass(kind: type, value: Any, path: str, place: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} in {place} is {_shown(value)}; it must be a table: write [{path}]")
    hints = get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            raise ConfigError(f"{prefix}{key} in {place} is not a recipe key. {_advice(key, path, prefix, hints)}")
    return kind(**{key: _value(hints[key], item, prefix + key, place) for key, item in value.items()})


def _value(kind: Any, value: Any, path: str, place: str) -> Any:
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _dataclass(kind, value, path, place)
    if get_origin(kind) is UnionType:  # `float | None`: None comes from plan.json only, as TOML has none
        return None if value is None else _value(get_args(kind)[0], value, path, place)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} in {place} is {_shown(value)}; it must be a table: write [{path}]")
        inner = get_args(kind)[1]
        return {key: _value(inner, item, f"{path}.{shown_key(key)}", place) for key, item in value.items()}
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            examples = {str: 'strings, such as ["caption"]', int: "whole numbers, such as [4, 8]"}
            how = examples.get(get_args(kind)[0], f"tables: write [[{path}]] above each of them")
            raise ConfigError(f"{path} in {place} must be an array of {how}")
        return tuple(_value(get_args(kind)[0], item, f"{path}[{index}]", place) for index, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{path} in {place} is {_shown(value)}; it must be {_KINDS[kind]}")
    if path.rpartition(".")[2] in _PLACES:
        return os.path.expanduser(value)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "an array"
    return repr(value)


def _advice(key: str, path: str, prefix: str, siblings: dict[str, Any]) -> str:
    """Suggests a similar key of the same table, else the same key in another table, else the DeepSpeed JSON."""
    if get_close_matches(key, siblings, n=1, cutoff=0.75):
        return did_you_mean(prefix + key, [prefix + name for name in siblings])
    elsewhere = [known for known in _all_keys(Recipe) if known.rpartition(".")[2] == key]
    if elsewhere:
        return f'Did you mean "{elsewhere[0]}"?'
    if key in TOP_LEVEL or path.partition(".")[0] in TOP_LEVEL:
        return "It is a DeepSpeed key: set it in the DeepSpeed JSON (ds_configs/)."
    return did_you_mean(prefix + key, [prefix + name for name in siblings])


def _all_keys(kind: type, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, tables included; without the keys inside arrays of tables."""
    hints = get_type_hints(kind)
    keys: list[str] = []
    for name in (item.name for item in fields(kind)):
        keys.append(prefix + name)
        if is_dataclass(hints[name]):
            keys += _all_keys(hints[name], f"{prefix}{name}.")
    return keys
