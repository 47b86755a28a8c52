"""Real limits of a machine for one command: a small disk, a limit on file sizes, another user."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.ranks import REPOSITORY, Finished, cpu_environment
from tests.support.warm import popen

NOBODY = 65534


def limited(command: list[object], before: Callable[[], object] | None = None, seconds: float = 120) -> Finished:
    """A command that has ended; `before` is called in its process first. Fails after `seconds`."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    process = popen(command, env=cpu_environment(), **options, **({"preexec_fn": before} if before else {}))
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException:
        process.kill()
        raise
    return Finished(process.returncode, out, err)


def file_size(limit: int) -> Callable[[], None]:
    """A limit on the size of files, in bytes, as `ulimit -f` sets it."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def as_nobody() -> None:
    """Become a user without rights, whom permissions bind."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@dataclass(frozen=True)
class Disk:
    """A small file system in memory, mounted at `folder`."""

    folder: Path

    def remount(self, options: str) -> None:
        """Change the size ("size=9m") or mount it read-only ("ro")."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def fill(self) -> Path:
        """Use all space that is left. Returns the file to remove."""
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return filler
        raise AssertionError("the disk has no end")


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Disk]:
    """Skips the test if this process may not mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small disk: full disks were not checked")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
