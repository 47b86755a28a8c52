"""A rank that leaves while a thread of gloo still waits to free a collective's tensor."""

from __future__ import annotations

import sys

from tests.support.runs import finish, free_port, start

# Rank 1 keeps the interpreter's lock from before its collective is done until it leaves.
_RANK = """
import sys, time
import torch
import torch.distributed as dist
from dsmoe_vl.command import leave

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
dist.barrier()
if rank == 0:
    time.sleep(0.5)
tensor = torch.ones(10)
work = dist.all_reduce(tensor, async_op=True)
if rank == 0:
    work.wait()
    time.sleep(5)
else:
    sys.setswitchinterval(100)
    del work, tensor
    until = time.monotonic() + 4
    while time.monotonic() < until:
        pass
leave(0)
"""


def test_a_thread_of_gloo_cannot_abort_it():
    """With sys.exit rank 1 ends by SIGABRT, with Python 3.11 and torch 2.13."""
    port = str(free_port())
    ranks = [start([sys.executable, "-c", _RANK, str(rank), port], cold=True) for rank in (0, 1)]
    results = [finish(process) for process in ranks]
    assert [result.status for result in results] == [0, 0], results
