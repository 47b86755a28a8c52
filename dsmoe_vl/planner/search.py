"""The fastest way to run a recipe's step on a cluster: ZeRO stage x expert parallelism x micro-batch x recomputation x
offloading, all of them tried. The number of packs in an optimizer step stays: learning depends on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dsmoe_vl.config.recipe import RECOMPUTED, Recipe
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.cluster import Cluster
from dsmoe_vl.planner.describe import shown_bytes
from dsmoe_vl.planner.forecast import Forecast, forecast
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RECOMPUTED_TEXT, RunPlan

_OFFLOADS = ("nothing", "optimizer", "optimizer and weights")
_LOWEST_STAGE = {"nothing": 0, "optimizer": 1, "optimizer and weights": 3}  # DeepSpeed's


@dataclass(frozen=True)
class Point:
    """One choice."""

    stage: int
    ep_size: int
    micro_batch: int
    accumulation: int
    recompute: str  # a key of `RECOMPUTED`
    offload: str  # of _OFFLOADS

    def settings(self, deepspeed: dict[str, Any]) -> dict[str, Any]:
        """A DeepSpeed JSON with these settings in place of its own; what is recomputed is in the recipe."""
        found = copy.deepcopy(deepspeed)
        found.pop("train_batch_size", None)
        found |= {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "expert_parallel": {"enabled": True, "autoep_size": self.ep_size},
        }
        zero = found.setdefault("zero_optimization", {})
        zero["stage"] = self.stage
        for section, wanted in (("offload_optimizer", _OFFLOADS[1:]), ("offload_param", _OFFLOADS[2:])):
            if self.offload not in wanted:
                zero.pop(section, None)
            elif zero.get(section, {}).get("device") != "cpu":
                zero[section] = {"device": "cpu", "pin_memory": True}
        found.pop("activation_checkpointing", None)
        return found

    def recipe(self, recipe: Recipe) -> Recipe:
        """A recipe with the choice of recomputation."""
        return replace(recipe, run=replace(recipe.run, recompute=self.recompute))

    def applied(self, plan: RunPlan) -> RunPlan:
        """A resolved plan of equally many packs, with these settings."""
        return replace(
            plan,
            recipe=self.recipe(plan.recipe),
            deepspeed=self.settings(plan.deepspeed),
            ep_size=self.ep_size,
            zero_stage=self.stage,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            recompute=self.recompute,
        )

    @property
    def text(self) -> str:
        """In words."""
        batch = f"{self.micro_batch} x {self.accumulation}"
        again = RECOMPUTED_TEXT[self.recompute]
        return f"ZeRO-{self.stage}, EP {self.ep_size}, packs {batch}, {again}, offloading {self.offload}"


def with_packs(deepspeed: dict[str, Any], packs: int, ranks: int) -> dict[str, Any]:
    """A DeepSpeed JSON with so many packs in an optimizer step over all ranks, one at a time. Raises ConfigError."""
    if packs < 1 or packs % ranks:
        raise ConfigError(f"--packs {packs}: give a multiple of {ranks} ranks")
    others = {key: value for key, value in deepspeed.items() if key != "train_batch_size"}
    return others | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": packs // ranks}


def points(plan: RunPlan) -> Iterator[Point]:
    """Every choice that resolves for a plan's recipe, ranks and packs."""
    experts = math.gcd(*experts_of_layers(plan.recipe)) or 1
    packs = plan.packs_per_step // plan.world_size
    stages = 3 if plan.recipe.moe.backend == "capacity" else 4
    for stage in range(stages):
        for ep_size in _divisors(math.gcd(experts, plan.world_size)):
            for micro_batch in _divisors(packs):
                for recompute in RECOMPUTED:
                    for offload in _OFFLOADS:
                        if stage >= _LOWEST_STAGE[offload]:
                            yield Point(stage, ep_size, micro_batch, packs // micro_batch, recompute, offload)


def search(plan: RunPlan, cluster: Cluster, tokens: float | None = None) -> list[tuple[Point, Forecast]]:
    """All points that fit, the fastest first; of equally fast ones that with more free memory. Raises ConfigError if
    none fits."""
    found = [(point, forecast(point.applied(plan), cluster, tokens)) for point in points(plan)]
    fitting = [pair for pair in found if pair[1].fits]
    if not fitting:
        point, least = min(found, key=lambda pair: pair[1].memory.device)
        raise ConfigError(
            f"nothing fits into {shown_bytes(cluster.memory_bytes)} of {cluster.name}: the least is "
            f"{shown_bytes(least.memory.device)} a rank with {point.text}, of it "
            f"{shown_bytes(least.memory.activations)} activations. Use more or larger accelerators, or a smaller "
            "data.pack_length and data.pack_patches"
        )
    return sorted(fitting, key=lambda pair: (pair[1].time.total, pair[1].memory.device))


def describe_search(plan: RunPlan, cluster: Cluster, found: list[tuple[Point, Forecast]], shown: int = 5) -> str:
    """The best few, and what each setting of the best is worth."""
    lines = [f"best of {len(found)} that fit, {plan.packs_per_step} packs a step"]
    for number, (point, forecast_) in enumerate(found[:shown], 1):
        memory = f"{shown_bytes(forecast_.memory.device)} of {shown_bytes(cluster.memory_bytes)}"
        lines.append(f"  {number}. {forecast_.tokens_per_second:>14,.0f} tokens/s, {memory}: {point.text}")
    best, of_best = found[0]
    lines.append("why the first")
    lines += [f"  {reason}" for reason in _reasons(plan, cluster, best, of_best)]
    return "\n".join(lines)


def _reasons(plan: RunPlan, cluster: Cluster, best: Point, of_best: Forecast) -> Iterator[str]:
    """What happens with another value of each setting and all others as they are."""
    of_name: dict[str, list[Point]] = {}
    for point in points(plan):
        changed = [name for name in ("stage", "ep_size", "micro_batch", "recompute", "offload")
                   if getattr(point, name) != getattr(best, name)]  # fmt: skip
        if len(changed) == 1:
            of_name.setdefault(changed[0], []).append(point)
    names = {"stage": "ZeRO-", "ep_size": "EP ", "micro_batch": "micro-batch ", "offload": "offloading "}
    for name, others in of_name.items():
        effects = []
        for point in others:
            other = forecast(point.applied(plan), cluster)
            slower = other.time.total / of_best.time.total - 1
            effect = f"{slower:+.1%} time" if other.fits else f"does not fit, {shown_bytes(other.memory.device)}"
            value = getattr(point, name)
            label = RECOMPUTED_TEXT[value] if name == "recompute" else f"{names[name]}{value}"
            effects.append(f"{label} {effect}")
        yield "; ".join(effects)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
