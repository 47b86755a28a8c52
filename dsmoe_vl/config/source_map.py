"""Where a source's own transformation is: `data.sources[].map = "module:function"`. Nothing is imported here."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.errors import ConfigError


@contextmanager
def working_folder_first() -> Iterator[None]:
    """Modules are found in the working directory too, as with `python -m`."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def split_map(name: str, place: str) -> tuple[str, str]:
    """Module and function of a `map`. Raises ConfigError for another form."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ConfigError(f'{place}: map = "{name}" is not of the form "module:function", as in "my_shards:to_sample"')
    module, _, function = name.partition(":")
    return module, function


def map_hashes(sources: Iterable[SourceConfig]) -> dict[str, str]:
    """`map_sha256` of the transformations of these sources, by name of the transformation. Raises ConfigError."""
    return {source.map: map_sha256(source.map, f"source {source.name}") for source in sources if source.map}


def map_sha256(name: str, place: str) -> str:
    """The SHA-256 of the file that has the function of a `map`, as hex digits.

    Raises ConfigError if the module has no file in the working directory or the environment.
    """
    module, _ = split_map(name, place)
    with working_folder_first():
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            found = None
    if found is None or not found.has_location or found.origin is None:
        raise ConfigError(
            f'{place}: map = "{name}": there is no module {module} in {os.getcwd()} or among the installed ones: put '
            f"{module.replace('.', os.sep)}.py there, or set PYTHONPATH to its folder"
        )
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()
