"""What a plan takes on a cluster: memory, time and the whole run, as one value and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.campaign import BYTES_OF_A_PAIR, DAY, Campaign, campaign
from dsmoe_vl.planner.cluster import Cluster
from dsmoe_vl.planner.describe import shown_bytes, shown_count, shown_flops
from dsmoe_vl.planner.plan import RECOMPUTED_TEXT, RunPlan
from dsmoe_vl.planner.products import Shape
from dsmoe_vl.planner.run_memory import RunMemory, run_memory
from dsmoe_vl.planner.step_time import StepTime, busiest_rank, step_time, violation


@dataclass(frozen=True)
class Forecast:
    """Estimates: time for average packs, memory for full ones."""

    plan: RunPlan
    cluster: Cluster
    shape: Shape  # of an average micro-step
    memory: RunMemory
    time: StepTime
    run: Campaign

    @property
    def fits(self) -> bool:
        """Whether devices and hosts have room. A snapshot of a save is not needed: without room, saves wait."""
        return replace(self.memory, host_snapshot=0.0).fits(self.cluster)

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, padding included."""
        return self.plan.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs a second over the accelerators' peak; what is computed again does not count."""
        return self.flops_per_second / self.cluster.peak_flops

    @property
    def flops_per_second(self) -> float:
        """Model FLOPs a second of one accelerator."""
        flops = self.plan.flops.training(self.shape.tokens, self.shape.patches, self.shape.labels)
        return self.plan.accumulation * flops / self.time.total


def forecast(
    plan: RunPlan,
    cluster: Cluster,
    tokens: float | None = None,
    busiest_expert: float | None = None,
    shape: Shape | None = None,
) -> Forecast:
    """Raises ConfigError for a cluster of another kind of device. `tokens`: the budget; by default that of the recipe.
    `busiest_expert`, `shape`: as in `step_time.py: step_time`."""
    if plan.device != cluster.device:
        raise ConfigError(
            f"the plan is for {plan.device}, and cluster {cluster.name} has {cluster.device}: name another"
        )
    time = step_time(plan, cluster, busiest_expert, shape)
    memory, average = (
        run_memory(plan, cluster, shape),
        shape or Shape.typical(plan.recipe, plan.micro_batch, plan.ep_size),
    )
    return Forecast(plan, cluster, average, memory, time, campaign(plan, cluster, time.total, tokens))


def describe_forecast(found: Forecast) -> str:
    """Several lines: the cluster, memory, step, run and data."""
    sections = (("cluster", _cluster(found)), ("memory per rank", _memory(found)), ("step", _step(found)))
    lines: list[str] = []
    for title, rows in (*sections, ("run", _run(found)), ("data and storage", _data(found))):
        lines += [title, *(f"  {name:<22}{value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


def _cluster(found: Forecast) -> Iterator[tuple[str, str]]:
    plan, cluster = found.plan, found.cluster
    yield "accelerators", f"{plan.world_size:,} x {cluster.name}, {cluster.accelerators} a node"
    yield "products", f"{shown_flops(cluster.product_rate)}/s of {shown_flops(cluster.peak_flops)}/s"
    yield "links", f"{cluster.link_rate / 1e9:,.3g} GB/s inside a node, {cluster.network_rate / 1e9:,.3g} GB/s between"
    batch = f"{plan.micro_batch} x {plan.accumulation} accumulated"
    recomputed = f", {RECOMPUTED_TEXT[plan.recompute]}" if plan.recompute != "none" else ""
    yield "plan", f"{plan.precision}, ZeRO-{plan.zero_stage}, EP {plan.ep_size}, packs {batch}{recomputed}"


def _memory(found: Forecast) -> Iterator[tuple[str, str]]:
    memory, cluster = found.memory, found.cluster
    for item in fields(memory):
        if not item.name.startswith("host"):
            yield item.name, shown_bytes(getattr(memory, item.name))
    verdict = "fits into" if memory.device <= cluster.memory_bytes else "DOES NOT FIT INTO"
    yield "device", f"{shown_bytes(memory.device)}, {verdict} {shown_bytes(cluster.memory_bytes)}"
    if memory.host_states:
        yield "host, offloaded", shown_bytes(memory.host_states)
    room = "" if memory.fits(cluster) or not found.fits else ", no room for all ranks of a host: saves wait"
    yield "host, for saves", shown_bytes(memory.host_snapshot) + room


def _step(found: Forecast) -> Iterator[tuple[str, str]]:
    time = found.time
    for item in fields(time):
        seconds = getattr(time, item.name)
        yield item.name.replace("_", " "), f"{shown_seconds(seconds)}, {seconds / time.total:.0%}"
    load = busiest_rank(found.plan.recipe, found.plan.ep_size, violation(found.plan.recipe))
    if load:
        yield "", f"the busiest rank's experts have {load:.0%} more than the mean"
    yield "together", shown_seconds(time.total)
    yield "tokens", f"{found.tokens_per_second:,.0f}/s, {found.tokens_per_second / found.plan.world_size:,.0f} a rank"
    yield "model FLOPs", f"{shown_flops(found.flops_per_second)}/s a rank, {found.mfu:.1%} of the peak (MFU)"


def _run(found: Forecast) -> Iterator[tuple[str, str]]:
    run = found.run
    yield "budget", f"{shown_count(run.tokens)} tokens, {run.steps:,} steps"
    if found.plan.recipe.stages:
        yield "stages", "not distinguished: every step trains what the recipe trains without them"
    yield "time", f"{run.seconds / DAY:,.2f} days, {run.accelerator_hours:,.0f} accelerator hours"
    blocked, writing = shown_seconds(run.blocked_seconds), shown_seconds(run.save_seconds)
    yield "checkpoint", f"{shown_bytes(run.checkpoint_bytes)}, written in {writing}; training waits {blocked}"
    if run.failures:
        yield "failures", f"{run.failures:,.1f} expected, one in {run.failure_seconds / 3600:,.1f} hours"
        yield "save every", f"{shown_seconds(run.save_every)}, {max(1, run.save_every / run.step_seconds):,.0f} steps"
    yield "lost work", f"{run.lost_share:.1%} of the time, for saves, restarts and steps done again"


def _data(found: Forecast) -> Iterator[tuple[str, str]]:
    run = found.run
    yield "pictures", f"{run.pictures_per_second:,.0f}/s of the largest size, or as many patches"
    yield "reading", f"{run.read_rate / 1e9:,.2f} GB/s, at {BYTES_OF_A_PAIR / 1e3:.0f} kB a pair"


def shown_seconds(seconds: float) -> str:
    """With a unit that suits."""
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{1e3 * seconds:.2f} ms"
