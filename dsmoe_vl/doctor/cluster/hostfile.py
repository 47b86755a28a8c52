"""The hostfile and `.deepspeed_env`, as `deepspeed` reads them, and what is wrong with them."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsmoe_vl.doctor.cluster.findings import ALL_HOSTS, Finding, Level
from dsmoe_vl.doctor.cluster.host_facts import Limited
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import require_regular

# What `deepspeed` takes: it reads the beginning of a line, so that it passes over what follows the number.
_LINE = re.compile(r"(\S+)\s+slots=(\d+)(.*)")
_EXAMPLE = "node-1 slots=8"
_RESOLVE_SECONDS = 5.0
# Beginnings of names: what `deepspeed` passes on to hosts by itself, and what matters there but is not passed on.
_PASSED_ON, _ONLY_HERE = ("PYTHON", "MV2", "UCX", "MLFLOW"), ("NCCL_", "GLOO_")


@dataclass(frozen=True)
class Hostfile:
    """`slots`: ranks of each host, by name, in the order of the file. `findings`: about its lines."""

    path: Path
    slots: Mapping[str, int]
    findings: tuple[Finding, ...]


def read_hostfile(path: Path) -> Hostfile:
    """Raises ConfigError if the file cannot be read."""
    try:
        text = require_regular(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"hostfile {path} cannot be read: {error.strerror}. launch/hostfile.example is an example"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"hostfile {path} is not UTF-8 text: {error.reason}") from None
    slots: dict[str, int] = {}
    findings = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        level, text, fix = _read_line(line.strip(), slots)
        if text:
            findings.append(Finding(level, ALL_HOSTS, "hostfile", f"{path}, line {number}: {text}", fix))
    if not slots:
        fix = f"write one host a line and how many ranks it takes, such as {_EXAMPLE}"
        findings.append(Finding("problem", ALL_HOSTS, "hostfile", f"{path} names no host", fix))
    elif not findings:
        total = sum(slots.values())
        findings.append(Finding("ok", ALL_HOSTS, "hostfile", f"{path}: {len(slots)} hosts, {total} ranks"))
    return Hostfile(path, slots, tuple(findings))


def _read_line(line: str, slots: dict[str, int]) -> tuple[Level, str, str]:
    """Add a line to `slots`; what is wrong with it ("" if nothing), and the fix."""
    match = _LINE.fullmatch(line)
    if match is None:
        return "problem", f"{line!r} is not of the form HOST slots=N", f"write it like {_EXAMPLE}"
    host, count, rest = match[1], int(match[2]), match[3].strip()
    if host in slots:
        return "problem", f"{host} is named twice", "give each host one line with all its ranks"
    if not count:
        return "problem", f"{host} has slots=0", "set its number of ranks, or remove the line"
    slots[host] = count
    if rest and not rest.startswith("#"):
        return "warning", f"{rest!r} after the number of {host} is passed over", "remove it"
    return "ok", "", ""


def judge_names(hostfile: Hostfile, here: str) -> Iterator[Finding]:
    """The names that the host `here` has no address for. ssh may know them from its own settings."""
    for host in hostfile.slots:
        limited = Limited()
        limited(host, partial(socket.getaddrinfo, host, None), _RESOLVE_SECONDS)
        if limited.unknown:
            text = (
                f"{here} has no address for {host} ({limited.unknown[host]}); ssh may know it, but ranks do not ask ssh"
            )
            yield Finding("warning", host, "hostfile", text, "correct the name, or add it to /etc/hosts on every host")


def passed_on(
    environment: Mapping[str, str], folders: Sequence[Path] = (Path.home(), Path())
) -> tuple[dict[str, str], list[Finding]]:
    """The variables that `deepspeed` sets on all hosts: some of its own environment, and those of `.deepspeed_env` in
    `folders`, the home and the working directory. And what is wrong with them."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    variables = {key: value for key, value in environment.items() if key.startswith(_PASSED_ON)}
    findings = []
    for path in dict.fromkeys((folder / name).absolute() for folder in folders):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            variable, equals, value = line.partition("=")
            if equals and variable.isidentifier():
                variables[variable] = value
            else:
                text = f"{path}, line {number}: {line!r} is not NAME=VALUE, and ends `deepspeed` with a traceback"
                fix = "remove blank lines and comments from it"
                findings.append(Finding("problem", ALL_HOSTS, "environment", text, fix))
    if only_here := [key for key in environment if key.startswith(_ONLY_HERE) and key not in variables]:
        text = f"{', '.join(only_here)}: set here, but `deepspeed --hostfile` does not pass it on to the hosts"
        fix = f"add NAME=VALUE to {name}, or set it in what the hosts' shells read"
        findings.append(Finding("warning", ALL_HOSTS, "environment", text, fix))
    return variables, findings
