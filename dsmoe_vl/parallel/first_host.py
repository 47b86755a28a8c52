"""The host of the first rank, which every rank must know, and the store there that connects the ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dsmoe_vl.errors import ConfigError, NetworkError
from dsmoe_vl.parallel.ranks import Ranks, first_port

_CONNECT_SECONDS = 30.0  # to the store of ranks that have been there; torch tries twice


def find_first_host(ranks: Ranks) -> None:
    """Set the first host's address and port in the environment, and this process's rank, as torch reads them.

    The address is the launcher's or the user's, else MPI's. Raises ConfigError if nothing does, or if MPI has
    another number of ranks.
    """
    os.environ.setdefault("MASTER_PORT", "0" if ranks.world_size == 1 else "29500")
    port = first_port(least=int(ranks.world_size > 1))
    if ranks.starts_mpi and "MASTER_ADDR" not in os.environ:
        import deepspeed  # imports much that a supervisor of ranks does not need

        deepspeed.comm.mpi_discovery(distributed_port=port, verbose=False)
        if (found := int(os.environ["WORLD_SIZE"])) != ranks.world_size:
            raise ConfigError(
                f"the launcher announced {ranks.world_size} ranks, but MPI knows of {found}: mpi4py uses another MPI "
                "than the launcher. Use the environment's mpirun, or export MASTER_ADDR and MASTER_PORT on every host"
            )
    ranks.export()
    if not os.environ.get("MASTER_ADDR"):
        missing = "empty" if "MASTER_ADDR" in os.environ else "not set"
        raise ConfigError(
            f"rank {ranks.rank} of {ranks.world_size} does not know the first host: MASTER_ADDR is {missing}. "
            "Use launch/slurm/train.sbatch, which sets it, or export MASTER_ADDR and MASTER_PORT on every host"
        )


def connect(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """The store of these ranks: torchrun has one, else the first rank hosts it. `find_first_host` comes before.

    Raises ConfigError if the port is in use, NetworkError if it cannot be reached within `timeout`.
    """
    address, port = os.environ["MASTER_ADDR"], first_port(least=int(ranks.world_size > 1))
    has_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = ranks.rank == 0 and not has_launchers
    try:
        store = dist.TCPStore(address, port, is_master=is_host, wait_for_workers=False, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"port {port} of the first host is in use, probably by another run: stop it, or choose another port "
                "with `deepspeed --master_port N`, or MASTER_PORT under other launchers"
            ) from error
        raise NetworkError(
            f"rank {ranks.rank} has not reached the first host at {address}, port {port}, in "
            f"{timeout.total_seconds():.0f} s: look whether rank 0 runs there, for firewalls and for cables"
        ) from error
    if has_launchers:  # it outlives the ranks: those that torchrun starts again would meet the keys of the first
        return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def own_store() -> dist.Store:
    """The store that connects the ranks, through a connection of its own: it answers while another call is blocked.

    Raises DistNetworkError after a minute or so if the first rank, which hosts it, has ended.
    """
    world = dist.group.WORLD
    assert world is not None
    shared: Any = world.get_group_store()  # type: ignore[attr-defined]
    limit = shared.timeout
    shared.set_timeout(timedelta(seconds=_CONNECT_SECONDS))
    try:
        own: dist.Store = shared.clone()
    finally:
        shared.set_timeout(limit)
    own.set_timeout(limit)
    return own
