"""Files that are replaced as a whole: a reader sees the old content or the new one, also after a power cut."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # suffix of a file that is still being written


def write_atomically(path: Path, data: bytes | str) -> None:
    """Create or replace the file `path`; text becomes UTF-8. On an OSError the old file stays."""
    with replacing(path) as temporary:
        temporary.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_json(path: Path, value: Any) -> None:
    """As `write_atomically`, with `value` as JSON."""
    write_atomically(path, json.dumps(value))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """For writers of their own: yields a new path beside `path`; the file written there replaces `path` at the end.

    After an exception in the block the new file is removed and the old one stays.
    """
    # The name is random because two processes may write the same file at once.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file to `path`, replacing it, once its content is on disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with suppress(OSError):  # some network file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def distinct_names(names: Iterable[str]) -> list[str]:
    """The same names for files or folders side by side; repeated ones get a number: a, a_2, a_3."""
    distinct: list[str] = []
    for name in names:
        unique, number = name, 1
        while unique in distinct:
            number += 1
            unique = f"{name}_{number}"
        distinct.append(unique)
    return distinct
