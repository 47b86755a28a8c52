"""Process groups: started once, the same way under every launcher."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.parallel.ranks import Ranks

_TIMEOUT = timedelta(
    minutes=20
)  # a first batch over a slow file system is no hang; a dead rank ends sooner by its launcher


def start_process_group(ranks: Ranks, device: str) -> None:
    """Initialise torch.distributed through DeepSpeed. Under MPI, mpi4py finds the first host (facts of the launcher).

    Raises ConfigError where several ranks were started and nothing names the first host.
    """
    under_mpi = "RANK" not in os.environ and ("OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ)
    if not under_mpi:
        ranks.export()
        if ranks.world_size > 1 and "MASTER_ADDR" not in os.environ:
            raise ConfigError(
                f"rank {ranks.rank} of {ranks.world_size} does not know the first host: MASTER_ADDR is not set. "
                "Use launch/slurm/train.sbatch, which sets it, or export MASTER_ADDR and MASTER_PORT on every node"
            )
        os.environ.setdefault("MASTER_PORT", "0" if ranks.world_size == 1 else "29500")
    port = int(os.environ.get("MASTER_PORT", "29500"))
    backend = "nccl" if device == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, distributed_port=port, timeout=_TIMEOUT, verbose=False)
    if dist.get_world_size() != ranks.world_size:
        raise ConfigError(
            f"the launcher announced {ranks.world_size} ranks but {dist.get_world_size()} joined; "
            "start all ranks with one launcher (mpirun, srun, torchrun or deepspeed)"
        )


class HostGroup:
    """Small integers over all ranks without touching the accelerator: counts before a forward, a request to stop."""

    def __init__(self) -> None:
        self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def sum(self, values: list[int]) -> list[int]:
        """Element-wise sums over all ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: int) -> int:
        """The largest value of any rank."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def _reduce(self, values: list[int], operation: dist.ReduceOp.RedOpType) -> list[int]:
        if dist.get_world_size() == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()

    def gather(self, value: object) -> list[object]:
        """Every rank's value, in rank order, on every rank."""
        values: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)
