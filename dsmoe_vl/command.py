"""What every program does around its work: a user's error in one line, and output that may lose its reader."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from dsmoe_vl.errors import as_user_error

# What a write reports when its reader has gone: a pipe, a terminal, a socket.
_NO_READER = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ENOTCONN)


def print_error(message: str) -> None:
    """Print a user's error to standard error."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def run(command: Callable[[], int], show: Callable[[str], None] = print_error) -> int:
    """The exit status of `command`: its own, 2 after a user's error, which `show` prints, or 130 after Ctrl-C.

    A closed standard output changes neither the work nor the status.
    """
    with steady_output():
        try:
            return command()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            known = as_user_error(error)
            if known is None:
                raise
            show(str(known))
            return 2


def leave(status: int) -> NoReturn:
    """End a program that has imported torch, with what is registered for its end but without the interpreter's
    finalization, which takes a second.

    A rank could not end with it: a thread of gloo frees the last collective's tensors when it gets to it. If that is
    during finalization, it cannot have the interpreter's lock any more, and the process aborts: "terminate called
    without an active exception" (https://github.com/pytorch/pytorch/pull/179291).
    """
    open_standard_streams()
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")  # it ends MPI in the finalization; mpirun reports processes that do not
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def open_standard_streams() -> None:
    """Open the null device for what was closed when the program started, as by `>&-`.

    Python has None for such a stream. And the next file that is opened gets the number of a closed descriptor: what
    other libraries and child processes write to standard output would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # has the lowest free number, which may be this one
            os.dup2(nowhere, number)
            os.set_inheritable(number, True)
            if nowhere != number:
                os.close(nowhere)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115  (it is open until the program ends)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


@contextmanager
def steady_output() -> Iterator[None]:
    """What every program works in. Standard streams are open, and writing to them never raises an OSError: the text is
    lost instead."""
    open_standard_streams()
    before = sys.stdout, sys.stderr
    steady = _Steady(sys.stdout), _Steady(sys.stderr)
    sys.stdout, sys.stderr = steady  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in steady:
            stream.end()


def has_lost_reader() -> bool:
    """Whether the reader of standard output or error has gone. Noticed when something is printed."""
    return any(isinstance(stream, _Steady) and stream.has_lost_reader for stream in (sys.stdout, sys.stderr))


class _Steady:
    """A text stream that drops what cannot be written. Without a reader, its descriptor leads to the null device."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.has_lost_reader = False

    def write(self, text: str) -> int:
        """As in TextIO, without OSErrors."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """As in TextIO, without OSErrors."""
        self.write("".join(lines))

    def flush(self) -> None:
        """As in TextIO, without OSErrors."""
        self._try(self._stream.flush)

    def end(self) -> None:
        """Flush; what cannot be written is dropped, else the interpreter would fail on it at the end."""
        if not self._try(self._stream.flush):
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, write: Callable[[], Any]) -> bool:
        try:
            write()
        except OSError as error:  # a full disk may have space later, a reader does not come back
            if error.errno in _NO_READER:
                self.has_lost_reader = True
                self._drop()
            return False
        return True

    def _drop(self) -> None:
        with contextlib.suppress(OSError):  # a stream without a descriptor has nothing to fail on
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()


def fraction(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 <= (number := float(text)) <= 1:
            return number
    raise argparse.ArgumentTypeError(f"{text}: must be a number from 0 to 1")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return number
