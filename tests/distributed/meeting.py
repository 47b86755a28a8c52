"""One rank of a start, for test_meeting.py: meets the others, or warms the groups up; prints how it ended.

Arguments: what to do; the number of the rank that does not take part, or -1; how many ranks the test has started.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.parallel import warm_up
from dsmoe_vl.parallel.first_host import connect, find_first_host
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.parallel.rendezvous import meet

ARRIVAL_SECONDS = 5.0
WARM_SECONDS = 10.0


def together(store: dist.Store, what: str, count: int) -> None:
    """Wait for `count` ranks."""
    store.add(what, 1)
    while store.add(what, 0) < count:
        time.sleep(0.05)


def meeting(ranks: Ranks, store: dist.Store, absent: int) -> None:
    """A rank that is absent only connects."""
    if ranks.rank != absent:
        meet(ranks, store, ARRIVAL_SECONDS)


def warming(ranks: Ranks, store: dist.Store, absent: int) -> None:
    """In two groups of all ranks, with an all-to-all in one. A rank that is absent makes them."""
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world_size)
    group = dist.new_group(list(range(ranks.world_size)))
    if ranks.rank != absent:
        warm_up.warm_up([group], WARM_SECONDS)
    else:
        warm_up.own_store().set(warm_up._host_key(ranks.rank), socket.gethostname())
        dist.barrier()


def stuck(ranks: Ranks, store: dist.Store, absent: int) -> None:
    """A rank takes part, but what it sends does not arrive."""
    if ranks.rank == absent:
        warm_up._use = lambda *_, **__: None
    warming(ranks, store, -1)


if __name__ == "__main__":
    own, modes = Ranks.discover(), {"meeting": meeting, "warming": warming, "stuck": stuck}
    find_first_host(own)
    shared = connect(own, timedelta(seconds=100))
    together(shared, "started", int(sys.argv[3]))
    try:
        modes[sys.argv[1]](own, shared, int(sys.argv[2]))
        print("met", flush=True)
    except DsmoeVlError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    if own.rank == 0:  # its store answers the others
        together(shared, "left", int(sys.argv[3]))
    else:
        shared.add("left", 1)
    os._exit(0)
