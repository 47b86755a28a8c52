"""The errors that a user can cause. Each message names the value, the place and the fix."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from dsmoe_vl.console import printable


class DsmoeVlError(Exception):
    """Base of every error that a user's input can cause; command lines print it without a traceback.

    Its text is printable: messages quote names and values from data.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n\t")


class ConfigError(DsmoeVlError):
    """An invalid recipe, DeepSpeed JSON, override or world size."""


class DataError(DsmoeVlError):
    """Shards, media or annotations that cannot be read, or too many bad samples."""


class FetchError(DsmoeVlError):
    """Remote storage or its local cache keeps failing; the data themselves may be intact."""


class CheckpointError(DsmoeVlError):
    """A checkpoint that is missing, incomplete, or does not match the model, tokenizer or topology."""


class NetworkError(DsmoeVlError):
    """Ranks that are not there, or hosts that cannot reach each other. Another start may find that this has changed."""


class DivergedError(DsmoeVlError):
    """Training whose loss or gradient is not finite for too many steps in a row."""


class FileError(DsmoeVlError):
    """A file or folder that the operating system refuses to read or write: a full disk, permissions, limits."""


_AGAIN = "then give the same command again"
# These are faults of the machine, whatever the program made of them.
_MACHINE = {
    errno.ENOSPC: f"free some space there, {_AGAIN}",
    errno.EDQUOT: f"free some of your quota there, {_AGAIN}",
    errno.EFBIG: f"raise the limit on the size of files (ulimit -f), {_AGAIN}",
    errno.EROFS: "name another place, or mount it writable",
    errno.EMFILE: f"raise the limit on open files (ulimit -n), {_AGAIN}",
    errno.ENFILE: f"too many files are open on this machine: end other programs, {_AGAIN}",
    errno.ESTALE: f"its network file system has changed on the server: mount it again, {_AGAIN}",
    errno.EIO: f"the disk or the network fails: see the system's log, {_AGAIN}",
}
# These are a user's errors only if the system names the file.
_OF_A_FILE = {
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOENT: "name an existing place, or restore it",
    errno.EEXIST: "name another place, or remove it",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a place in a folder",
    errno.ELOOP: "its symbolic links lead in a circle: name another place",
    errno.ENXIO: "name a regular file",
}


def as_user_error(error: BaseException) -> DsmoeVlError | None:
    """`error` itself if it is a user's error, a FileError if the operating system is the reason; None for others."""
    if isinstance(error, DsmoeVlError):
        return error
    for reason in _reasons(error):
        if not isinstance(reason, OSError) or reason.errno is None:
            continue
        advice = _MACHINE.get(reason.errno)
        if advice is None and reason is error and reason.filename is not None:
            advice = _OF_A_FILE.get(reason.errno)
        if advice is not None:
            place = "" if reason.filename is None else f"{os.fsdecode(reason.filename)}: "
            return FileError(f"{place}{reason.strerror}; {advice}")
    return None


def _reasons(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
