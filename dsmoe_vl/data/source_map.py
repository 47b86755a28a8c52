"""A source's own transformation: a user's function that takes the files of a sample and returns others, or None.

Both are dicts as WebDataset's: `{"__key__": KEY, "__url__": the tar, "jpg": bytes, "json": bytes, ...}`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsmoe_vl.config.source_map import split_map, working_folder_first
from dsmoe_vl.data.shards.tar import SampleFiles
from dsmoe_vl.errors import ConfigError, DataError

_Function = Callable[[dict[str, Any]], dict[str, Any] | None]


@lru_cache(maxsize=64)
def load_map(name: str) -> _Function:
    """The function of a `map`, imported. Raises ConfigError."""
    place = "data.sources"
    module, function = split_map(name, place)
    with working_folder_first():
        try:
            found = getattr(importlib.import_module(module), function, None)
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(f'{place}: map = "{name}" cannot be imported: {type(error).__name__}: {error}') from error
    if not callable(found):
        raise ConfigError(f'{place}: map = "{name}": module {module} has no function {function}')
    loaded: _Function = found
    return loaded


def mapped(name: str, path: Path, sample: SampleFiles) -> SampleFiles:
    """What a `map` makes of all files of a sample in the tar `path`; its key stays.

    Values may be bytes; a text, stored as UTF-8; and what JSON has, for `json`. Raises DataError if the function
    returns None, raises anything, or returns something else.
    """
    where = f"{name}: {path}: {sample.key}"
    given: dict[str, Any] = {"__key__": sample.key, "__url__": str(path), **sample.files}
    try:
        found = load_map(name)(given)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # of a user's function
        raise DataError(f"map failed: {where}: {type(error).__name__}: {error}") from error
    if found is None:
        raise DataError(f"left out by map: {where}")
    if not isinstance(found, dict):
        raise DataError(f"map failed: {where}: it returned {type(found).__name__}, not a dict or None")
    files = {str(key).lower(): _encoded(key, value, where) for key, value in found.items() if key[:2] != "__"}
    return SampleFiles(sample.key, files, tuple(f"{sample.key}.{extension}" for extension in files))


def _encoded(extension: str, value: Any, where: str) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if extension == "json":
        try:
            return json.dumps(value).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"map failed: {where}: json is {type(value).__name__}: {error}") from error
    raise DataError(f"map failed: {where}: {extension!r} is {type(value).__name__}: return bytes or a text")
