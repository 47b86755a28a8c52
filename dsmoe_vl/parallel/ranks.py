"""Who this process is: rank, world size and local rank, whatever started it. The one map of launchers' variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_vl.errors import ConfigError


@dataclass(frozen=True)
class _Launcher:
    """The environment variables of one kind of launcher. `step`: a variable without which the others mean nothing."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: tuple[str, ...]
    starts_mpi: bool = False  # mpi4py then finds the first host
    step: str = ""


# The first launcher whose rank and world size are both set wins.
_LAUNCHERS = (
    # the first sets LOCAL_SIZE, the second LOCAL_WORLD_SIZE
    _Launcher("deepspeed or torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    _Launcher(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        starts_mpi=True,
    ),
    _Launcher(
        "MVAPICH2's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
        starts_mpi=True,
    ),
    _Launcher(
        "MPICH's or Intel MPI's mpirun",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        ("MPI_LOCALNRANKS",),
        starts_mpi=True,
    ),
    # srun. A plain `python` in a batch script has SLURM_PROCID too: it counts only inside a step.
    _Launcher(
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        ("SLURM_NTASKS_PER_NODE",),
        step="SLURM_STEP_ID",
    ),
    # An older srun, which does not say how many tasks its step has.
    _Launcher(
        "srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE",), step="SLURM_STEP_ID"
    ),
)


@dataclass(frozen=True)
class Ranks:
    """This process among all. `local_size`: processes on this host. `starts_mpi`: started by a launcher of MPI."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int = 1
    starts_mpi: bool = False

    @classmethod
    def discover(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """From the launcher's variables; one process if there are none. Raises ConfigError for a value that is no
        number, and for a rank out of range."""
        for launcher in _LAUNCHERS:
            needed = (launcher.rank, launcher.world_size, *filter(None, (launcher.step,)))
            if not all(name in environment for name in needed):
                continue
            found = {
                name: whole_number(environment, name, launcher.name)
                for name in (launcher.rank, launcher.world_size, launcher.local_rank, *launcher.local_size)
                if name in environment
            }
            rank, world_size = found[launcher.rank], found[launcher.world_size]
            if not 0 <= rank < world_size:
                raise ConfigError(
                    f"{launcher.rank}={rank} is not below {launcher.world_size}={world_size}; start all ranks with "
                    "one launcher"
                )
            local_rank = found.get(launcher.local_rank, 0)
            local_size = next((found[name] for name in launcher.local_size if name in found), 1)
            # Slurm's variable is of the whole job, whose steps may be smaller.
            return cls(rank, world_size, local_rank, min(local_size, world_size), launcher.starts_mpi)
        return cls(0, 1, 0)

    def export(self, environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
        """Set the names that torch and DeepSpeed read. A launcher of several ranks must name the first host itself."""
        environment["RANK"], environment["WORLD_SIZE"] = str(self.rank), str(self.world_size)
        environment["LOCAL_RANK"] = str(self.local_rank)
        if self.world_size == 1:
            environment.setdefault("MASTER_ADDR", "127.0.0.1")


def whole_number(environment: Mapping[str, str], name: str, launcher: str) -> int:
    """The value of a variable that `launcher` sets. Raises ConfigError if it is not a whole number of at least 0."""
    value = environment[name].strip()
    if not (value.isascii() and value.isdecimal()):
        raise ConfigError(
            f"{name}={environment[name]!r} in the environment is not a whole number: {launcher} sets it. Start all "
            f"ranks with one launcher, or `unset {name}`"
        )
    return int(value)


def first_port(environment: Mapping[str, str] = os.environ, least: int = 1) -> int:
    """MASTER_PORT, or DeepSpeed's default. Raises ConfigError. `least`: 0 if any free port will do."""
    text = environment.get("MASTER_PORT", "29500").strip()
    if not (text.isascii() and text.isdecimal()) or not least <= int(text) < 2**16:
        raise ConfigError(f"MASTER_PORT={text} is not a port: set it to a number from 1 to 65535, such as 29500")
    return int(text)
