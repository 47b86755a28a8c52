"""Who this process is: rank, world size and local rank, whatever started it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_vl.errors import ConfigError

# Launcher by launcher: rank, world size, local rank. The first complete triple wins.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # deepspeed, torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def discover(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """From the launcher's variables; one process where there are none.

        `srun` inside an allocation of one task per node sets SLURM_* for a plain `python` too: those count only where
        a step was started (SLURM_STEP_ID) with more than one task.
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
        """Set the names that torch and DeepSpeed read. A launcher of several ranks must name the first host itself."""
        environment["RANK"], environment["WORLD_SIZE"] = str(self.rank), str(self.world_size)
        environment["LOCAL_RANK"] = str(self.local_rank)
        if self.world_size == 1:
            environment.setdefault("MASTER_ADDR", "127.0.0.1")
