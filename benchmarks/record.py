"""A result file: the figures of one benchmark, and what they come from.

Result files stand in benchmarks/results/ under any name; `benchmark` says what was measured. They keep the command as
it was typed (without the output file, and without paths of the machine), the commit ("+changes" if the code differed
from it), the date, the machine and the versions of what was installed. What is not known is null. `summary.py` makes
the tables of README.md and docs/ from these files.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
_PACKAGES = ("torch", "deepspeed", "numpy", "webdataset", "pillow", "simplejpeg", "av", "transformers")
_CPU_FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "amx_bf16": "AMX"}


@dataclass(frozen=True)
class Machine:
    """Where a benchmark ran; None is not recorded. `accelerator` is "none" where the machine has none."""

    cpu: str | None = None
    cores: int | None = None
    features: list[str] | None = None  # of the CPU: those of AVX2, AVX-512 and AMX that it has
    accelerator: str | None = None

    @classmethod
    def this(cls) -> Machine:
        """The present one."""
        import torch

        accelerator = "none"
        if torch.cuda.is_available():
            accelerator = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        info = Path("/proc/cpuinfo")
        fields = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
        known = {name.strip(): value.strip() for name, _, value in fields}
        flags = known.get("flags", "").split()
        features = [name for flag, name in _CPU_FEATURES.items() if flag in flags] if flags else None
        return cls(known.get("model name") or platform.processor() or None, os.cpu_count(), features, accelerator)


@dataclass(frozen=True)
class Result:
    """The contents of a result file; None is not recorded."""

    benchmark: str
    command: str
    commit: str | None
    date: str | None  # ISO 8601, UTC
    machine: Machine
    versions: dict[str, str]
    figures: dict[str, Any]

    @classmethod
    def now(cls, benchmark: str, figures: dict[str, Any], command: str | None = None) -> Result:
        """Figures of this process, or of the `command` that it has run."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(benchmark, command or typed(sys.argv), _commit(), date, Machine.this(), _versions(), figures)

    @classmethod
    def read(cls, file: Path) -> Result:
        """Raises SystemExit, which names the file, for one that is no result file."""
        try:
            found = json.loads(file.read_text())
            return cls(**{**found, "machine": Machine(**found["machine"])})
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"{file} is not a result file of benchmarks/record.py: {error!r}") from error

    def write(self, file: Path) -> None:
        """As JSON; folders are made."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")
        print(f"wrote {file}")


def typed(argv: list[str]) -> str:
    """The command of a script of this repository, from its `sys.argv`, as a user types it in the repository.

    DeepSpeed's launcher, which gives every rank a --local_rank, is named with the number of ranks; others are not.
    """
    launcher, words, skip = "python", [], False
    for word in argv:
        if word.startswith("--local_rank"):
            launcher = f"deepspeed --num_accelerators {os.environ.get('WORLD_SIZE', '1')}"
        elif skip or word.startswith("--json="):
            skip = False
        elif word == "--json":
            skip = True
        else:
            name, equals, value = word.rpartition("=")
            words.append(f"{name}{equals}{_portable(value)}")
    return f"{launcher} {shlex.join(words)}"


def _portable(word: str) -> str:
    """A path as seen from the repository; of a folder outside of it, only the last name."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f".../{path.name}"


def _commit() -> str | None:
    """The commit of the code; DSMOE_VL_COMMIT gives it where a copy of the repository has no history."""
    if given := os.environ.get("DSMOE_VL_COMMIT"):
        return given
    tables = (":!benchmarks/results", ":!docs", ":!*.md")  # these change from one measurement to the next
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *tables)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
