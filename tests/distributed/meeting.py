"""One rank of a start, for test_meeting.py: meets the others, or warms the groups up; prints how it ended.

Arguments: what to do; the number of the rank that does not take part, or -1.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.parallel import warm_up
from dsmoe_vl.parallel.first_host import connect, find_first_host
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.parallel.rendezvous import meet

ARRIVAL_SECONDS = 15.0
WARM_SECONDS = 5.0


def meeting(ranks: Ranks, store: dist.Store, absent: int) -> None:
    """A rank that is absent only connects."""
    if ranks.rank != absent:
        meet(ranks, store, ARRIVAL_SECONDS)


def warming(ranks: Ranks, store: dist.Store, absent: int) -> None:
    """In two groups of all ranks, with an all-to-all in one."""
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world_size)
    group = dist.new_group(list(range(ranks.world_size)))
    if ranks.rank == absent:
        dist.barrier()
        time.sleep(2 * WARM_SECONDS)
    else:
        warm_up.warm_up([group], WARM_SECONDS)


def stuck(ranks: Ranks, store: dist.Store, absent: int) -> None:
    """A rank takes part, but what it sends does not arrive."""
    if ranks.rank == absent:
        warm_up._use = lambda *_, **__: time.sleep(2 * WARM_SECONDS)
    warming(ranks, store, -1)


if __name__ == "__main__":
    own = Ranks.discover()
    find_first_host(own)
    try:
        {"meeting": meeting, "warming": warming, "stuck": stuck}[sys.argv[1]](
            own, connect(own, timedelta(seconds=60)), int(sys.argv[2])
        )
        print("met", flush=True)
    except DsmoeVlError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    if own.rank == 0:
        time.sleep(2)  # its store answers the others
    sys.stdout.flush()
    os._exit(0)
