"""Download one remote file: from a web server, through fsspec, or from the output of a command.

Every download has a time limit, so none hangs. It fails with a `PermanentFailure` if trying again is of no use, and
with a `TransientFailure` if another try may succeed.
"""

from __future__ import annotations

import http.client
import os
import select
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator
from contextlib import closing, suppress
from queue import Empty, SimpleQueue
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import fsspec

from dsmoe_vl.config.recipe import PIPE

Transport = Generator[int | bytes | None, None, None]

_BLOCK = 2**20  # bytes to read at once
_WEB = ("http://", "https://")
_TRY_AGAIN = (408, 425, 429)  # HTTP statuses below 500 that may pass: timeout, too early, too many requests
_NEVER = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,  # a malformed URL, an unknown protocol, an invalid certificate
    ImportError,  # the package that a protocol of fsspec needs
    http.client.InvalidURL,
)
_NO_SUCH_COMMAND = (126, 127)  # exit statuses of the shell


class PermanentFailure(Exception):
    """Trying again is of no use. The message says why."""


class TransientFailure(Exception):
    """Another try may succeed. The message says what went wrong."""


def is_remote(path: str) -> bool:
    """Whether the path of a source is a URL or a command, not a local folder."""
    return path.startswith(PIPE) or "://" in path


def file_url(folder: str, name: str) -> str:
    """The URL or command of the file `name` in a remote folder.

    Raises PermanentFailure for a name that a shell could read as more than a word: a manifest must not run commands.
    """
    if folder.startswith(PIPE):
        if shlex.quote(name) != name or name.startswith("-"):
            raise PermanentFailure(f"{name!r} is not a safe name in a shell command; rename the shard")
        return folder.replace("{}", name)
    if folder.startswith(_WEB):
        parts = urlsplit(folder)  # the query, such as an access token, stays at the end
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{folder.rstrip('/')}/{name}"


def without_query(url: str) -> str:
    """`url` for messages and cache keys. The query of a web address may be an access token: secret, and short-lived."""
    return url.partition("?")[0] if url.startswith(_WEB) else url


def download(url: str, timeout: float, size: int | None = None) -> Generator[bytes, None, None]:
    """The content of a file, block by block.

    Args:
        timeout: seconds without a byte after which the download fails.
        size: expected bytes, for transports that do not announce them.

    Raises:
        PermanentFailure, TransientFailure: nothing else.
    """
    transport = _command if url.startswith(PIPE) else _web if url.startswith(_WEB) else _fsspec
    received = 0
    try:
        with closing(transport(url, timeout)) as source:
            announced = next(source)  # each transport first yields the number of bytes, or None
            for block in source:
                assert isinstance(block, bytes)
                received += len(block)
                yield block
    except (PermanentFailure, TransientFailure):
        raise
    except Exception as error:  # fsspec passes on whatever storage libraries raise
        raise _failure(error) from error
    expected = announced if isinstance(announced, int) else size
    if expected is not None and received < expected:
        raise TransientFailure(f"ended after {received} of {expected} bytes")


def _failure(error: Exception) -> PermanentFailure | TransientFailure:
    if isinstance(error, HTTPError):
        error.close()
        permanent = error.code < 500 and error.code not in _TRY_AGAIN
        text = f"HTTP {error.code} {error.reason}"
    else:
        cause = error.reason if isinstance(error, URLError) else error
        permanent = isinstance(cause, _NEVER)
        text = f"{type(cause).__name__}: {cause}" if isinstance(cause, Exception) else str(cause)
    return PermanentFailure(text) if permanent else TransientFailure(text)


def _web(url: str, timeout: float) -> Transport:
    with urlopen(Request(url, headers={"User-Agent": "dsmoe_vl"}), timeout=timeout) as response:
        yield response.length
        while block := response.read(_BLOCK):
            yield block


def _fsspec(url: str, timeout: float) -> Transport:
    """Reads in a thread, which is abandoned if it hangs: not every file system of fsspec has time limits."""

    def read() -> Transport:
        files, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        with files.open(path, "rb") as file:
            yield getattr(file, "size", None)
            while block := file.read(_BLOCK):
                yield block

    asked: SimpleQueue[bool] = SimpleQueue()
    answers: SimpleQueue[int | bytes | Exception | None] = SimpleQueue()

    def answer() -> None:
        source = read()
        while asked.get():
            try:
                answers.put(next(source, b""))
            except Exception as error:
                answers.put(error)

    threading.Thread(target=answer, daemon=True).start()
    try:
        while True:
            asked.put(True)
            item = answers.get(timeout=timeout)
            if isinstance(item, Exception):
                raise item
            if item == b"":
                return
            yield item
    except Empty:
        raise TransientFailure(f"no data for {timeout:g} s") from None
    finally:
        asked.put(False)


def _command(url: str, timeout: float) -> Transport:
    yield None
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            ["/bin/sh", "-c", url.removeprefix(PIPE)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            start_new_session=True,  # a process group, to kill all that the shell has started
        )
        assert process.stdout is not None
        try:
            readable = select.poll()
            readable.register(process.stdout)
            while readable.poll(timeout * 1000):
                if not (block := process.stdout.read(_BLOCK)):
                    break
                yield block
            else:
                raise TransientFailure(f"no data for {timeout:g} s")
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TransientFailure(f"did not end {timeout:g} s after its last byte") from None
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        if status:
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip()[-300:]
            kind = PermanentFailure if status in _NO_SUCH_COMMAND else TransientFailure
            raise kind(f"exit status {status}: {said}")
