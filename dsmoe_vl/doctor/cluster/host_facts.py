"""What is so on one host: gathered once, each part within a time limit, and sent to who judges as JSON."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.background import BackgroundThread
from dsmoe_vl.data.copies import Copy, read_copy
from dsmoe_vl.errors import as_user_error
from dsmoe_vl.parallel.device import device_name, free_host_bytes

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[3]
_SECONDS = 10.0  # for one part: a file system that does not answer must not keep the doctor waiting
_PACKAGES = ("deepspeed", "numpy", "sentencepiece", "ninja")
_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "NCCL_IB_DISABLE",
)
_DRIVER = Path("/proc/driver/nvidia/version")
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Accelerator:
    """A GPU that this host's processes see; memory in bytes."""

    name: str
    memory: int
    free: int


@dataclass(frozen=True)
class Interface:
    """A network interface. `megabits`: per second; 0 if the system does not know."""

    name: str
    up: bool
    addresses: tuple[str, ...]
    megabits: int


@dataclass(frozen=True)
class Space:
    """A file system: bytes. `path`: the folder that was asked about, `at` the one of its parents that exists."""

    path: str
    at: str
    free: int
    total: int
    writable: bool = True


@dataclass(frozen=True)
class SourceRate:
    """How fast the shards of a source can be read, and what its samples are: means of some of them, 0 if unknown."""

    name: str
    weight: float
    bytes_per_second: float
    sample_bytes: float
    sample_tokens: float


@dataclass(frozen=True)
class HostFacts:
    """Of one host, by the process that gathered them. None: not known; `unknown` then says why, by the field's name."""

    host: str
    versions: Mapping[str, str] | None = None  # of programs and of builds, by name
    repository: str = ""
    python: str = ""  # the interpreter
    device: str = "cpu"
    accelerators: tuple[Accelerator, ...] | None = None
    cores: int = 1
    memory: tuple[int, int] | None = None  # bytes: free, all
    shm: Space | None = None  # /dev/shm
    run_folder: Space | None = None
    run_folder_id: str = ""  # the same on hosts that share it
    open_files: tuple[int, int] | None = None  # limits: soft, hard; -1: none
    interfaces: tuple[Interface, ...] | None = None
    infiniband: tuple[float, ...] = ()  # Gbit/s of each port that has a link
    own_address: str | None = None  # what the host's name means to itself
    environment: Mapping[str, str] = field(default_factory=dict)
    clock: float = 0.0  # seconds since 1970
    heard: float = 0.0  # the same moment by the clock of who judges
    clock_error: float = 0.0  # seconds by which `heard` may be wrong
    port_in_use: bool | None = None  # MASTER_PORT, where nothing of this run can have taken it
    copy_rate: float | None = None  # bytes per second of a copy in memory
    matrix_rate: float | None = None  # FLOP/s of one rank's matrix products
    sources: tuple[SourceRate, ...] | None = None
    copy: Copy | None = None  # of tokenizer and manifests
    unknown: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """In one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> HostFacts:
        """The inverse of `to_json`."""
        values: dict[str, Any] = json.loads(text)
        kinds = {"accelerators": Accelerator, "interfaces": Interface, "sources": SourceRate}
        for name, kind in kinds.items():
            if values[name] is not None:
                values[name] = tuple(kind(**_with_tuples(item)) for item in values[name])
        for name, single in (("shm", Space), ("run_folder", Space), ("copy", Copy)):
            if values[name] is not None:
                values[name] = single(**_with_tuples(values[name]))
        return cls(**_with_tuples(values))


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


class Limited:
    """Calls functions with a time limit, and keeps why one has no result."""

    def __init__(self) -> None:
        self.unknown: dict[str, str] = {}

    def __call__(self, name: str, call: Callable[[], T], seconds: float = _SECONDS) -> T | None:
        """The result; None if the call fails or takes longer. The other checks are made all the same."""
        future = BackgroundThread[T]().submit(call)
        if not wait([future], seconds).done:
            self.unknown[name] = f"no answer within {seconds:g} s"
            return None
        error = future.exception()
        if error is None:
            return future.result()
        known = as_user_error(error)
        self.unknown[name] = f"{type(error).__name__}: {error}" if known is None else str(known)
        return None


def gather(host: str, recipe: Recipe, run_dir: Path, port: int | None = None) -> HostFacts:
    """The facts of this host, without those of `supply.py`. `port`: MASTER_PORT, if it must be free now. Raises
    ConfigError for a wrong DS_ACCELERATOR."""
    limited = Limited()
    device = device_name()
    return HostFacts(
        host,
        versions=limited("versions", _versions),
        repository=str(ROOT),
        python=sys.executable,
        device=device,
        accelerators=limited("accelerators", _accelerators, 30.0),
        cores=len(os.sched_getaffinity(0)),
        memory=limited("memory", lambda: (free_host_bytes(), psutil.virtual_memory().total)),
        shm=limited("shm", lambda: _space(Path("/dev/shm"))),
        run_folder=limited("run_folder", lambda: _space(run_dir)),
        run_folder_id=limited("run_folder_id", lambda: _identity(run_dir)) or "",
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        interfaces=limited("interfaces", _interfaces),
        infiniband=limited("infiniband", _infiniband) or (),
        own_address=limited("own_address", lambda: socket.gethostbyname(socket.gethostname())),
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        port_in_use=None if port is None else _is_taken(port),
        copy=limited("copy", lambda: read_copy(recipe, host), 20.0),
        unknown=limited.unknown,
    )


def _versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["dsmoe_vl"] = _sha256_of_code()
    found["cuda of torch"] = torch.version.cuda or torch.version.hip or "none"
    if torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if _DRIVER.exists() and (driver := re.search(r"\d+\.\d+[.\d]*", _DRIVER.read_text())):
        found["driver"] = driver[0]
    if compiler := shutil.which(os.environ.get("CXX", "c++")):
        found["compiler"] = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        ).stdout.partition("\n")[0]
    found["cpu"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found["libc"] = " ".join(platform.libc_ver())
    return {name: version for name, version in found.items() if version}


def _sha256_of_code() -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "dsmoe_vl").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _accelerators() -> tuple[Accelerator, ...]:
    import torch

    if device_name() == "cpu":
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(index)
        found.append(Accelerator(torch.cuda.get_device_name(index), memory, free))
    return tuple(found)


def _space(path: Path) -> Space:
    at = _existing(path)
    usage = shutil.disk_usage(at)
    return Space(str(path), str(at), usage.free, usage.total, os.access(at, os.W_OK | os.X_OK))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _identity(path: Path) -> str:
    """Folders on disks of their own may have the same number, but not the same last change."""
    at = _existing(path)
    status = at.stat()
    return f"{at} {status.st_ino} {status.st_ctime_ns}"


def _interfaces() -> tuple[Interface, ...]:
    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return tuple(
        Interface(
            name,
            state.isup,
            tuple(one.address.partition("%")[0] for one in addresses.get(name, ()) if one.family in families),
            max(0, state.speed),
        )
        for name, state in states.items()
    )


def _infiniband() -> tuple[float, ...]:
    """Each port's file says such as "200 Gb/sec (4X HDR)"."""
    rates = []
    for port in sorted(_INFINIBAND.glob("*/ports/*")):
        if "ACTIVE" in (port / "state").read_text():
            rates.append(float((port / "rate").read_text().split()[0]))
    return tuple(rates)


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store of the ranks does
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
