"""A whole run on a cluster: time, checkpoints, failures, and what data and storage must deliver."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsmoe_vl.planner.cluster import Cluster
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.products import PATCHES_USED
from dsmoe_vl.planner.run_memory import checkpoint_bytes

DAY = 86400.0
# DataComp's largest pool: 12.8 B pairs in 450 TB (Gadre et al. 2023, appendix).
BYTES_OF_A_PAIR = 35e3
# Assumptions, in seconds: from a failure to the first step, besides noticing it and reading the checkpoint; and between
# saves, at least, since more of them in the background cost storage and gain little.
_START, _OFTEN = 120.0, 300.0


@dataclass(frozen=True)
class Campaign:
    """Seconds and bytes, over all ranks."""

    tokens: float  # of the budget, padding included
    steps: int
    step_seconds: float
    accelerators: int
    checkpoint_bytes: float
    save_seconds: float  # to write one checkpoint
    blocked_seconds: float  # that training stands still for it
    failure_seconds: float  # mean time between failures; inf: none
    save_every: float  # seconds: the best interval
    lost_share: float  # of the time, for saves and for work done again
    pictures_per_second: float  # of the largest size, that have as many patches as packs use
    read_rate: float  # bytes/s from storage, for these

    @property
    def seconds(self) -> float:
        """Until the budget is spent, failures included."""
        return self.steps * self.step_seconds / (1 - self.lost_share)

    @property
    def accelerator_hours(self) -> float:
        """Of all."""
        return self.seconds * self.accelerators / 3600

    @property
    def failures(self) -> float:
        """Expected."""
        return self.seconds / self.failure_seconds


def campaign(plan: RunPlan, cluster: Cluster, step_seconds: float, tokens: float | None = None) -> Campaign:
    """For a budget of tokens; by default that of `run.steps`. Saves happen in the background (`checkpoint/`): training
    stands still while a rank's share is copied to its host, and the next save waits for the last one."""
    tokens = plan.recipe.run.steps * plan.tokens_per_step if tokens is None else tokens
    written = checkpoint_bytes(plan)
    nodes = math.ceil(plan.world_size / cluster.accelerators)
    saving = written / (nodes * cluster.storage_bandwidth)
    blocked = written / plan.world_size / cluster.host_bandwidth
    failures = cluster.failures_per_day * plan.world_size
    between = DAY / failures if failures else math.inf
    every = max(best_interval(blocked, between), saving, step_seconds, _OFTEN)
    restart = plan.recipe.run.stall_seconds + saving + _START
    data = plan.recipe.data
    pictures = plan.packs_per_step * data.pack_patches * PATCHES_USED / data.image_max_patches / step_seconds
    return Campaign(
        tokens=tokens,
        steps=math.ceil(tokens / plan.tokens_per_step),
        step_seconds=step_seconds,
        accelerators=plan.world_size,
        checkpoint_bytes=written,
        save_seconds=saving,
        blocked_seconds=blocked,
        failure_seconds=between,
        save_every=every,
        lost_share=min(lost_share(every, blocked, saving, restart, between), 0.99),
        pictures_per_second=pictures,
        read_rate=pictures * BYTES_OF_A_PAIR,
    )


def best_interval(save: float, between: float) -> float:
    """The time between saves of `save` seconds that loses least, for a mean time `between` failures (Daly 2006, eq. 37;
    its first term is Young's of 1974). inf without failures."""
    if math.isinf(between):
        return math.inf
    if save >= 2 * between:
        return between
    ratio = math.sqrt(save / (2 * between))
    return math.sqrt(2 * save * between) * (1 + ratio / 3 + ratio**2 / 9) - save


def lost_share(every: float, save: float, writing: float, restart: float, between: float) -> float:
    """Of the time: standing still for saves; and after a failure the restart, half an interval of work done again, and
    the time in which the newest save was not complete yet (Daly 2006, section 2)."""
    if math.isinf(between):
        return 0.0 if math.isinf(every) else save / every
    return save / every + (every / 2 + writing + restart) / between
