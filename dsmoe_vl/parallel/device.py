"""What this machine computes with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from dsmoe_vl.errors import ConfigError

# AVX512_BF16 does not count: its products are twice as fast as in fp32, but a whole step is slower (quickstart, two
# ranks on two cores: 3,100 against 3,950 tokens/s in fp32), since nothing else gains and everything is cast.
_BF16_FLAG = "amx_bf16"
_LOCAL_SIZES = (
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)


def device_name() -> Literal["cpu", "cuda"]:
    """The kind of device that training uses here: DS_ACCELERATOR's, which DeepSpeed reads too, or else what is there.

    Raises ConfigError where the variable names anything but cpu or a cuda that is there.
    """
    name = os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return "cpu"
    if name == "cuda" and torch.cuda.is_available():
        return "cuda"
    raise ConfigError(f"DS_ACCELERATOR={name} in the environment: unset it, or set it to cpu; cuda needs a visible GPU")


def has_bf16_unit(device: str) -> bool:
    """Whether a step in bf16 is faster than in fp32: on any recent GPU; on a CPU with matrix units, by its flags."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return _BF16_FLAG in flags.split()


def use_device(name: str, local_rank: int, environment: Mapping[str, str] = os.environ) -> torch.device:
    """Make this rank's device current. On a CPU the ranks of a host share its cores evenly, unless OMP_NUM_THREADS is
    set: two ranks with a thread a core each run two to four times slower than with half of the cores."""
    if name == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if "OMP_NUM_THREADS" not in environment:
        local_ranks = next((int(environment[key]) for key in _LOCAL_SIZES if key in environment), 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    return torch.device("cpu")
