"""What the doctor of a cluster has found, and the list that it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsmoe_vl.console import printable

Level = Literal["ok", "warning", "problem"]
ALL_HOSTS = ""
_COLOURS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "problem": "\x1b[31m"}
_PLAIN = "\x1b[0m"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `host`: one host's name, or ALL_HOSTS. `fix`: what to do; a problem has one, unless its
    text ends with it."""

    level: Level
    host: str
    check: str
    text: str
    fix: str = ""


def unchecked(host: str, check: str, why: str) -> Finding:
    """A check that could not be made."""
    return Finding("warning", host, check, f"not checked: {why}")


def as_list(findings: Sequence[Finding], colours: bool) -> str:
    """The findings of all hosts, then host by host, and how many there are of each level."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for host in dict.fromkeys((ALL_HOSTS, *(finding.host for finding in findings))):
        lines.append(printable(host) or "all hosts")
        for finding in (finding for finding in findings if finding.host == host):
            word = f"{finding.level:7}"
            shown = f"{_COLOURS[finding.level]}{word}{_PLAIN}" if colours else word
            lines.append(f"  {shown}  {finding.check:{width}}  {printable(finding.text, keep=chr(10))}")
            if finding.fix:
                lines.append(f"  {'':7}  {'':{width}}  fix: {printable(finding.fix)}")
    counts = {level: sum(finding.level == level for finding in findings) for level in _COLOURS}
    lines.append(", ".join(f"{count} {level}{'s' * (level != 'ok' and count != 1)}" for level, count in counts.items()))
    return "\n".join(lines)


def status(findings: Sequence[Finding]) -> int:
    """The exit status: 1 if there is a problem, else 0."""
    return int(any(finding.level == "problem" for finding in findings))
