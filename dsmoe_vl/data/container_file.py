"""Opens the containers of videos and recordings, the same way for all readers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import av

from dsmoe_vl.errors import DataError


@contextmanager
def reading(data: bytes, form: str, what: str) -> Iterator[av.container.InputContainer]:
    """Open the bytes of a file with the container `form`, FFmpeg's name.

    Titles and other metadata in any encoding, or damaged ones, are no error: nothing reads them. Raises DataError, also
    for errors of FFmpeg in the `with` block: `WHAT cannot be decoded: the reason`.
    """
    try:
        with av.open(io.BytesIO(data), "r", format=form, metadata_errors="replace") as opened:
            yield opened
    except DataError:
        raise
    except Exception as error:  # FFmpeg raises anything for malformed bytes
        # Its text also has a number, and a file's name, which bytes in memory do not have.
        reason = error.strerror if isinstance(error, av.error.FFmpegError) else ""
        raise DataError(f"{what} cannot be decoded: {reason or error}") from error
