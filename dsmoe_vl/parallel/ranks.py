"""Rank, world size and local rank of this process, under every launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_vl.errors import ConfigError

# Per launcher: rank, world size, local rank. The first launcher whose rank and world size are set wins.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # deepspeed, torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)


@dataclass(frozen=True)
class Ranks:
    """The ranks of this process, and the number of all."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def discover(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Read the launcher's environment variables; a single process if there are none.

        Inside a Slurm allocation SLURM_* are set for a plain `python` too, so they count only in a step that `srun`
        started (SLURM_STEP_ID). Raises ConfigError for a rank that is not below the world size.
        """
        for names in _VARIABLES:
            if names[0].startswith("SLURM") and "SLURM_STEP_ID" not in environment:
                continue
            if all(name in environment for name in names[:2]):
                rank, world_size = int(environment[names[0]]), int(environment[names[1]])
                local_rank = int(environment.get(names[2], 0))
                if not 0 <= rank < world_size:
                    raise ConfigError(
                        f"{names[0]}={rank} is not below {names[1]}={world_size}; start all ranks with one launcher"
                    )
                return cls(rank, world_size, local_rank)
        return cls(0, 1, 0)

    def export(self, environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
        """Set the variables that torch and DeepSpeed read. With several ranks the launcher must set MASTER_ADDR."""
        environment["RANK"], environment["WORLD_SIZE"] = str(self.rank), str(self.world_size)
        environment["LOCAL_RANK"] = str(self.local_rank)
        if self.world_size == 1:
            environment.setdefault("MASTER_ADDR", "127.0.0.1")
