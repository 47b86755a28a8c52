"""launch/train.py with a fault of one rank in its first save at ZeRO-3, named by the variable FAULT."""

from __future__ import annotations

import errno
import itertools
import os
import runpy
import signal
from collections.abc import Callable
from typing import Any

from dsmoe_vl.checkpoint import tensor_files
from dsmoe_vl.checkpoint.partitions import Joint
from dsmoe_vl.checkpoint.tensor_files import Share
from tests.support.runs import TRAIN


def once(real: Callable[..., Any], fault: Callable[[], None], at: int) -> Callable[..., Any]:
    """`real`, with a fault before its call number `at`."""

    left = itertools.count(1)

    def call(*args: Any) -> Any:
        if next(left) == at:
            fault()
        return real(*args)

    return call


def no_memory() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Give rank 1 the fault, and train."""
    fault = os.environ["FAULT"]
    if os.environ["RANK"] == "1":
        if fault == "memory":
            Share.kept = once(Share.kept, no_memory, 1)
        elif fault == "disk":
            tensor_files._write_all = once(tensor_files._write_all, no_space, 3)
        elif fault == "kill":
            Joint.whole = once(Joint.whole, kill, 5)
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
