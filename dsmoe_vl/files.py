"""Files that are replaced as a whole: a reader sees the old content or the new one, also after a power cut."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # suffix of a file that is still being written
_PROBE = bytes(2**20)
_IRREGULAR = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular(path: Path) -> Path:
    """`path`, to be opened. Raises OSError for a FIFO, a socket or a device, which might wait for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # whoever opens it learns why
        return path
    _check_regular(mode, path)
    return path


def open_regular(path: Path) -> io.FileIO:
    """The file, opened for reading with as few calls of the operating system as can be. Raises OSError as
    `require_regular`."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # or a FIFO would wait for its writer
    try:
        _check_regular(os.fstat(handle).st_mode, path)
        return io.FileIO(handle)
    except BaseException:
        os.close(handle)
        raise


def _check_regular(mode: int, path: Path) -> None:
    if stat.S_ISREG(mode):
        return
    for is_kind, kind in _IRREGULAR:
        if is_kind(mode):
            raise OSError(errno.ENXIO, f"it is {kind}, not a regular file", str(path))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """If the block fails because the operating system does not let it write, the error is an OSError that names a file.

    `path`: the file or folder that the block writes. Python's own writes do not name it, and libraries hide the reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename).endswith(PARTIAL)):
            error.filename = str(path)
        raise
    except Exception as error:
        refusal = _refusal(path, str(error))
        if refusal is None:
            raise
        raise OSError(refusal, os.strerror(refusal), str(path)) from error


@contextmanager
def sharing(what: str) -> Iterator[None]:
    """If the block cannot get the memory that processes share, the error names it: it is a file without a path, which a
    limit on the size of files (`ulimit -f`) holds for too."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and not isinstance(error.filename, str):
            error.filename = f"shared memory of {what}"
        raise


def has_file_limit() -> bool:
    """Whether this process has a limit on the size of files."""
    return _file_limit() != resource.RLIM_INFINITY


def _file_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0]


def _refusal(path: Path, message: str) -> int | None:
    """The errno with which the operating system refuses to write to `path`; None if it does not refuse."""
    if told := re.search(r"\(os error (\d+)\)", message):  # by a library in Rust
        return int(told[1])
    folder = path if path.is_dir() else path.parent
    probe = folder / f"probe.{secrets.token_hex(4)}{PARTIAL}"
    try:
        if has_file_limit() and any(file.stat().st_size >= _file_limit() for file in folder.iterdir()):
            return errno.EFBIG
        probe.write_bytes(_PROBE)
    except OSError as error:
        return error.errno
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


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

    After an exception in the block the new file is removed and the old one stays. An OSError names `path`. Raises
    OSError for a FIFO, a socket or a device, which would be lost.
    """
    require_regular(path)
    # The name is random because two processes may write the same file at once.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with writing(path):
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
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    with suppress(OSError):  # some network file systems cannot sync a folder
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


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
