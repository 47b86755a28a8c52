"""Sums over the steps of one logging interval, kept on the device; read back once per interval.

Shapes: N MoE layers, J tasks, M modalities, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from dsmoe_vl.moe.balance import mutual_information
from dsmoe_vl.moe.stats import LIVE_SHARE, RoutingSums
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.training.step import StepResult


class Window:
    """Collects steps; `close` returns their means and starts the next interval.

    peak_flops: peak FLOP per second of all ranks' devices together; None if unknown.
    """

    def __init__(self, plan: RunPlan, peak_flops: float | None = None) -> None:
        self.plan, self.peak_flops = plan, peak_flops
        self._begin()

    def _begin(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.skipped, self.routed_tokens = 0, 0
        self.counts: dict[str, int] = {}
        self.terms: dict[str, Tensor] = {}
        self.missing: set[str] = set()  # terms of skipped steps
        self.routing: RoutingSums | None = None
        self.learning_rate, self.grad_norm = 0.0, math.nan
        self.part_norms: dict[str, Tensor] = {}

    def add(self, step: StepResult) -> None:
        """Add one step."""
        self.steps += 1
        for name, count in step.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.learning_rate = step.learning_rate
        if step.skipped is not None:  # its values would make those of the whole interval not finite
            self.skipped += 1
            self.missing.update(step.terms)
            return
        for name, value in step.terms.items():
            self.terms[name] = self.terms[name] + value if name in self.terms else value
        if step.routing is not None:
            self.routed_tokens += step.counts["tokens"]
            sums = zip(self.routing or map(torch.zeros_like, step.routing), step.routing, strict=True)
            self.routing = RoutingSums(*(total + new for total, new in sums))
        self.grad_norm = step.grad_norm
        self.part_norms = step.part_norms

    def time(self, seconds: float, waited: float) -> None:
        """Add the wall time of a step, and the part of it spent waiting for data, seconds."""
        self.seconds += seconds
        self.waited += waited

    def close(self, phases: Mapping[str, float] = MappingProxyType({})) -> dict[str, float]:
        """Means over the interval, in the units of their names; those of loss and routing over the steps that were not
        skipped, nan if all were. phases: seconds of each in the interval."""
        updates = self.steps - self.skipped
        values = dict.fromkeys(sorted(self.missing), math.nan)
        values |= {name: float(total) / updates for name, total in self.terms.items()}
        values["skipped_steps"] = self.skipped
        values["lr"] = self.learning_rate
        values["grad_norm"] = self.grad_norm
        values |= {f"grad_norm_{part}": float(norm) for part, norm in self.part_norms.items()}
        tokens, patches, labels = (self.counts[name] for name in ("tokens", "patches", "labels"))
        values["tokens_per_second"] = tokens / self.seconds
        values["tflops"] = self.plan.flops.training(tokens, patches, labels) / self.seconds / 1e12  # of all ranks
        if self.peak_flops is not None:
            values["mfu"] = values["tflops"] * 1e12 / self.peak_flops
        values["step_ms"] = 1e3 * self.seconds / self.steps
        values["data_wait_ms"] = 1e3 * self.waited / self.steps
        values |= {f"{name}_ms": 1e3 * seconds / self.steps for name, seconds in phases.items()}
        values["real_tokens"] = tokens / self.steps / self.plan.tokens_per_step
        if pairs := self.counts.get("retrieval"):
            contrasts = 1 if self.plan.recipe.tasks.retrieval.gradient_cache else self.plan.accumulation
            values["pairs"] = pairs / self.steps / contrasts  # that are contrasted with each other
        if self.routing is not None:
            load, entropy, dropped, _, violation = self.routing
            per_expert = load.sum((1, 2))
            experts = torch.tensor(experts_of_layers(self.plan.recipe), device=load.device).unsqueeze(-1)
            exists = torch.arange(per_expert.shape[-1], device=load.device) < experts
            share = per_expert / per_expert.sum(-1, keepdim=True) * experts
            values["max_violation"] = float(share.max() - 1)  # busiest expert of all layers
            values["max_violation_micro"] = float(violation.max()) / updates  # mean over micro-batches
            values["dead_fraction"] = float((share < LIVE_SHARE)[exists].float().mean())
            values["entropy"] = float(entropy.sum(-1).mean()) / self.routed_tokens
            values["drop_fraction"] = float(dropped.sum() / (load.sum() + dropped.sum()))
            values["mutual_information"] = float(mutual_information(load.sum(2)).mean())  # between tasks and experts
        self._begin()
        return values
