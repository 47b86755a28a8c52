"""What the threads of a save do: one copies this rank's share to host memory, another one writes the copies."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from dsmoe_vl.checkpoint.partitions import HostGroups, first_failure
from dsmoe_vl.checkpoint.tensor_files import FileEntry, Share, write_tensors
from dsmoe_vl.files import writing


def give_way() -> None:
    """Let others of the machine run before this thread, but for a tenth of a core: a save has time until the next one.
    Linux only."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def side_stream() -> Any:
    """Where copies run beside the kernels of training; they see what was done before. None on a CPU."""
    if not torch.cuda.is_available():
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def copies_of(shares: Mapping[str, Share], stream: Any) -> dict[str, Share]:
    """The shares on the host, by file. Raises OSError for whatever fails, most likely for memory."""
    try:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return {name: share.kept() for name, share in shares.items()}
    except Exception as error:  # torch has no type of its own for a host's memory
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(errno.ENOMEM, f"no copy could be made in memory ({reason})") from error


def write_copies(folder: Path, copying: Future[dict[str, Share]], groups: HostGroups) -> dict[str, Any]:
    """Write what all ranks have copied.

    Raises OSError if this rank could not copy; at ZeRO-3, where ranks put weights together, if any could not.
    """
    failure = copying.exception()
    assert failure is None or isinstance(failure, OSError), failure
    failure = first_failure(failure, groups)
    if failure is not None:
        raise failure
    return write_shares(folder, copying.result())


def write_shares(folder: Path, shares: Mapping[str, Share]) -> dict[str, Any]:
    """Write this rank's files, that of the weights first. Raises OSError, of the first file that fails."""
    files: dict[str, FileEntry] = {}
    broken, failure = None, None
    for file, share in shares.items():
        try:
            with writing(folder / file):
                files[file], found = write_tensors(folder / file, share)
            broken = broken or found
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return {"files": files, "weights": list(next(iter(shares.values())).specs), "broken": broken}
