"""Runs this repository's Python on other hosts over ssh, as `deepspeed --hostfile` does: without a password, from the
same working directory, with the same interpreter."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dsmoe_vl.doctor.cluster.findings import Finding

_CONNECT_SECONDS = 5
_AT_ONCE = 64
_NO_FOLDER, _NO_PYTHON, _NO_SSH = 91, 92, 255  # exit statuses: two of ours, ssh's own
_OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}")
# What ssh says, and what helps.
_FIXES = (
    ("Host key verification failed", "connect once by hand to accept its key: ssh {host}"),
    ("Permission denied", "let ssh in without a password: ssh-copy-id {host}"),
    ("Could not resolve hostname", "correct the name in the hostfile, or add it to /etc/hosts or ~/.ssh/config"),
    ("Connection refused", "start sshd there, or set its port in ~/.ssh/config"),
    ("timed out", "see that the host is up, and that no firewall closes its port"),
    ("No route to host", "see that the host is up, and that its network is reachable from here"),
)


K = TypeVar("K")


@dataclass(frozen=True)
class Command:
    """Python with `arguments` on a host."""

    host: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a host has answered: its standard output, and between when (seconds since 1970); or the problem with its
    fix."""

    out: str = ""
    asked: float = 0.0
    ended: float = 0.0
    problem: str = ""
    fix: str = ""

    def finding(self, host: str) -> Finding:
        """About ssh to the host that has given it."""
        if self.problem:
            return Finding("problem", host, "ssh", self.problem, self.fix)
        return Finding("ok", host, "ssh", "answers without a password, with the same paths")


def ask_all(commands: Mapping[K, Command], seconds: float) -> dict[K, Answer]:
    """`ask` for several at once; answers by the same keys."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = {key: pool.submit(ask, command, seconds) for key, command in commands.items()}
        return {key: future.result() for key, future in futures.items()}


def ask(command: Command, seconds: float) -> Answer:
    """Run a command for at most `seconds`."""
    host, folder, python = command.host, shlex.quote(os.getcwd()), shlex.quote(sys.executable)
    settings = shlex.join(f"{name}={value}" for name, value in command.environment.items())
    script = (
        f"cd {folder} 2>/dev/null || exit {_NO_FOLDER}; test -x {python} || exit {_NO_PYTHON}; "
        f"exec env {settings} {python} {shlex.join(command.arguments)}"
    )
    asked = time.time()
    try:
        done = subprocess.run(
            ["ssh", *_OPTIONS, "--", host, f"sh -c {shlex.quote(script)}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return Answer(problem="ssh is not installed here", fix="install it, or start the doctor under your launcher")
    except subprocess.TimeoutExpired:
        return Answer(problem=f"no answer over ssh within {seconds:.0f} s", fix=f"see what this does: ssh {host} true")
    if done.returncode == 0:
        return Answer(done.stdout, asked, time.time())
    return _failure(host, done.returncode, done.stderr)


def _failure(host: str, status: int, said: str) -> Answer:
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    if status == _NO_FOLDER:
        fix = "launchers start the same path everywhere: put the repository there, or share it"
        return Answer(problem=f"there is no folder {Path.cwd()}, from which the run would start", fix=fix)
    if status == _NO_PYTHON:
        return Answer(problem=f"there is no {sys.executable}", fix="run `bash launch/setup.sh` in the repository there")
    if status == _NO_SSH:
        fix = next((fix for text, fix in _FIXES if text in said), "see what this does: ssh {host} true")
        return Answer(problem=f"ssh -o BatchMode=yes {host}: {last}", fix=fix.format(host=host))
    return Answer(
        problem=f"the doctor failed there with status {status}: {last}", fix=f"see its whole message: ssh {host}"
    )
