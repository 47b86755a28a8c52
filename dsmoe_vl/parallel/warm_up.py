"""Every process group is used once before the first step.

A group connects its ranks when it is first used. In the first update of the weights, memory is short for that; and of
two hosts that cannot talk, nothing would be known but that a step takes long.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsmoe_vl.errors import NetworkError
from dsmoe_vl.parallel.first_host import own_store

_SECONDS = 120.0  # for one group
_FEW = 4  # ranks that a message lists


def warm_up(exchanging: Collection[dist.ProcessGroup] = (), seconds: float = _SECONDS) -> None:
    """One all-reduce in every group that this rank is in, also in those that DeepSpeed has made.

    Collective. All ranks make their groups in the same order, so no two wait for each other in different ones.
    `exchanging`: groups that will also do an all-to-all, whose connections are others.

    Raises NetworkError, after `seconds` in one group, that names the ranks that do not take part, with their hosts.
    """
    store = own_store()
    store.set(_host_key(dist.get_rank()), socket.gethostname())
    dist.barrier()  # ranks that are still making a model are no reason to end here
    for group in distributed_c10d._world.pg_map:
        ranks = dist.get_process_group_ranks(group)
        name = distributed_c10d._world.pg_names[group]
        begun = store.add(_begun_key(name, dist.get_rank()), 1)
        try:
            _use(group, exchanges=group in exchanging, limit=timedelta(seconds=seconds))
        except RuntimeError as error:  # a time limit, or a connection that was closed
            raise NetworkError(_why(store, group, name, ranks, begun, seconds)) from error


def _use(group: dist.ProcessGroup, exchanges: bool, limit: timedelta) -> None:
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    values = torch.zeros(dist.get_world_size(group), device=device)
    dist.all_reduce(values, group=group, async_op=True).wait(limit)
    if exchanges:
        dist.all_to_all_single(torch.empty_like(values), values, group=group, async_op=True).wait(limit)


def _why(
    store: dist.Store, group: dist.ProcessGroup, name: str, ranks: Sequence[int], begun: int, seconds: float
) -> str:
    """Who has not taken part; or that all have, so that the network is at fault."""
    own = dist.get_rank()
    absent = [rank for rank in ranks if store.add(_begun_key(name, rank), 0) < begun]
    what = f"a group of {len(ranks)} ranks was not ready within {seconds:.0f} s, on {_named(store, [own])}"
    if absent:
        return f"{what}: {_named(store, absent)} did not take part: stopped, or behind a network that fails"
    backend = dist.get_backend(group)
    advice = "; NCCL_DEBUG=INFO says more, and NCCL_SOCKET_IFNAME chooses the interface" if backend == "nccl" else ""
    return f"{what}: between two of {_named(store, ranks)}, {backend} does not get through{advice}"


def _named(store: dist.Store, ranks: Sequence[int]) -> str:
    named = []
    for rank in ranks[:_FEW]:
        is_known = store.check([_host_key(rank)])  # else `get` would wait
        named.append(f"rank {rank} ({store.get(_host_key(rank)).decode()})" if is_known else f"rank {rank}")
    more = len(ranks) - len(named)
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _host_key(rank: int) -> str:
    return f"warm_up/host{rank}"


def _begun_key(group: str, rank: int) -> str:
    return f"warm_up/{group}/{rank}"
