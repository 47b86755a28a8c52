"""Optimizer steps on packs that are the same whatever the split, and the end of a script that takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from dsmoe_vl.command import leave
from dsmoe_vl.data.pack import collate
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.training.step import OptimizerStep
from tests.distributed.train_losses import PACKS_PER_STEP
from tests.support.batches import mixed_pack


def take_steps(
    plan: RunPlan, ranks: Ranks, engine: Any, device: torch.device, steps: int, part_norms: bool = False
) -> Iterator[Any]:
    """The result of each step, of two micro-steps."""
    take_step = OptimizerStep(plan, ranks, engine, HostGroup(), device)
    for step in range(steps):
        packs = [mixed_pack(100 * step + n) for n in range(ranks.rank, PACKS_PER_STEP, ranks.world_size)]
        half = len(packs) // 2
        shared = take_step.share([collate(packs[:half]), collate(packs[half:])])
        yield take_step(shared.batches, shared.counts, part_norms)


def report(ranks: Ranks, found: Any) -> NoReturn:
    """Print as one JSON line on rank 0, and end."""
    if ranks.rank == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)
