"""The machines of a plan: a TOML file in `launch/clusters/`, in which every figure has its source beside it.

    peak_flops = { value = 989.4e12, source = "https://www.nvidia.com/en-us/data-center/h200/, dense bf16" }

Bandwidths are those of one accelerator in one direction, unless their comment says otherwise.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dsmoe_vl.config.bounds import bounded, out_of_bounds
from dsmoe_vl.config.suggest import did_you_mean
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import require_regular

SHIPPED = Path(__file__).resolve().parents[2] / "launch" / "clusters"


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal accelerators; a `share` is what software reaches of the figure before it."""

    name: str
    device: Literal["cpu", "cuda"]
    accelerators: int = bounded(1, least=1)  # of one node
    peak_flops: float = bounded(0.0, above=0)  # FLOP/s of dense products in the plan's precision: bf16, on a CPU fp32
    product_share: float = bounded(0.0, above=0, most=1)
    attention_share: float = bounded(0.0, above=0, most=1)  # of peak_flops, forward and backward together
    memory_bytes: float = bounded(0.0, above=0)  # of one accelerator
    memory_bandwidth: float = bounded(0.0, above=0)  # bytes/s
    memory_share: float = bounded(0.0, above=0, most=1)
    reserved_bytes: float = bounded(0.0, least=0)  # of a process before it has a model: context, libraries
    fragmentation: float = bounded(0.0, least=0)  # of memory that comes and goes, above what is asked for
    operator_seconds: float = bounded(0.0, least=0)  # of the host, to start one operator
    link_bandwidth: float = bounded(0.0, above=0)  # bytes/s to the other accelerators of the node
    link_share: float = bounded(0.0, above=0, most=1)
    link_latency: float = bounded(0.0, least=0)  # seconds a message
    network_bandwidth: float = bounded(0.0, above=0)  # bytes/s to other nodes
    network_share: float = bounded(0.0, above=0, most=1)
    network_latency: float = bounded(0.0, least=0)
    host_bandwidth: float = bounded(0.0, above=0)  # bytes/s between an accelerator and host memory
    host_memory_bytes: float = bounded(0.0, above=0)  # of one node
    host_memory_bandwidth: float = bounded(0.0, above=0)  # bytes/s of one node
    storage_bandwidth: float = bounded(0.0, above=0)  # bytes/s of one node to and from the storage that all share
    patches_per_second: float = bounded(0.0, above=0)  # that one loader process decodes and cuts
    failures_per_day: float = bounded(0.0, least=0)  # that end a run, of one accelerator with its share of the rest

    @property
    def product_rate(self) -> float:
        """FLOP/s of a large matrix product."""
        return self.peak_flops * self.product_share

    @property
    def memory_rate(self) -> float:
        """Bytes/s of operators that compute element by element."""
        return self.memory_bandwidth * self.memory_share

    @property
    def link_rate(self) -> float:
        """Bytes/s of a collective inside a node."""
        return self.link_bandwidth * self.link_share

    @property
    def network_rate(self) -> float:
        """Bytes/s of a collective between nodes."""
        return self.network_bandwidth * self.network_share


_WORDS = ("name", "device")
FIGURES = tuple(item.name for item in fields(Cluster) if item.name not in _WORDS)


def load_cluster(path: Path) -> Cluster:
    """The cluster in a file. Raises ConfigError for one that cannot be read, and for a figure that is missing, unknown,
    out of bounds or without a source."""
    table = _read(path)
    unknown = [key for key in table if key not in (*_WORDS, *FIGURES)]
    if unknown:
        raise ConfigError(f"{unknown[0]} in {path} is no figure of a cluster. {did_you_mean(unknown[0], FIGURES)}")
    missing = [key for key in (*_WORDS, *FIGURES) if key not in table]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} in {path}: missing. Add it as in the files of {SHIPPED.parent.name}/{SHIPPED.name}: "
            'KEY = { value = NUMBER, source = "where it is from" }'
        )
    if table["device"] not in ("cpu", "cuda"):
        raise ConfigError(f"device = {table['device']!r} in {path} must be 'cpu' or 'cuda' (ROCm's name is cuda too)")
    cluster = Cluster(str(table["name"]), table["device"], **{key: _value(key, table[key], path) for key in FIGURES})
    for key, value, rule in out_of_bounds(cluster):
        raise ConfigError(f"{key} = {value} in {path} {rule}")
    return cluster


def sources(path: Path) -> dict[str, str]:
    """Where each figure of a file is from. Raises ConfigError."""
    load_cluster(path)
    return {key: _read(path)[key]["source"] for key in FIGURES}


def cluster_of(name: str) -> Cluster:
    """A shipped cluster by the name of its file. Raises ConfigError for an unknown one."""
    names = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    if name not in names:
        raise ConfigError(
            f"--gpu {name}: no such file in launch/clusters/. {did_you_mean(name, names)} Or give --cluster."
        )
    return load_cluster(SHIPPED / f"{name}.toml")


def write_cluster(cluster: Cluster, source: dict[str, str]) -> str:
    """A cluster as the text of a file, with the source of each figure."""
    lines = [f'name = "{cluster.name}"', f'device = "{cluster.device}"']
    lines += [f'{key} = {{ value = {getattr(cluster, key):.6g}, source = "{source[key]}" }}' for key in FIGURES]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(require_regular(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cluster file {path} cannot be read: {error.strerror}. Shipped: launch/clusters/.") from None
    except ValueError as error:
        raise ConfigError(f"cluster file {path} is not valid TOML: {error}") from None


def _value(key: str, entry: Any, path: Path) -> Any:
    if not isinstance(entry, dict) or set(entry) != {"value", "source"} or not str(entry["source"]).strip():
        raise ConfigError(f'{key} in {path} must be {{ value = NUMBER, source = "where it is from" }}')
    value = entry["value"]
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{key} = {value!r} in {path} must be a number")
    return int(value) if key == "accelerators" else float(value)
