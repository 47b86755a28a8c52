"""Sums over the steps of one logging interval, kept on the device; read back once an interval.

Shapes: N MoE layers, J tasks, M modalities, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_vl.config.plan import RunPlan


class Window:
    """Collects steps; `close` returns their means and begins anew."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self._begin()

    def _begin(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.counts: dict[str, int] = {}
        self.terms: dict[str, Tensor] = {}
        self.load: Tensor | None = None
        self.entropy: Tensor | None = None
        self.learning_rate, self.grad_norm = 0.0, 0.0

    def add(
        self,
        terms: dict[str, Tensor],
        load: Tensor | None,
        entropy: Tensor | None,
        counts: dict[str, int],
        learning_rate: float,
        grad_norm: float | Tensor | None,
    ) -> None:
        """One step's global terms, load [N, J, M, E], entropy sums [N] and counts of tokens, patches, targets."""
        self.steps += 1
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for name, value in terms.items():
            self.terms[name] = self.terms[name] + value if name in self.terms else value
        if load is not None and entropy is not None:
            self.load = load if self.load is None else self.load + load
            self.entropy = entropy if self.entropy is None else self.entropy + entropy
        self.learning_rate = learning_rate
        self.grad_norm = float(grad_norm) if grad_norm is not None else float("nan")

    def time(self, seconds: float, waited: float) -> None:
        """Wall time of a step and the part of it that was spent waiting for data."""
        self.seconds += seconds
        self.waited += waited

    def close(self) -> dict[str, float]:
        """Means over the interval, in the units that their names say."""
        values = {name: float(total) / self.steps for name, total in self.terms.items()}
        values["lr"] = self.learning_rate
        values["grad_norm"] = self.grad_norm
        tokens, patches = self.counts["tokens"], self.counts["patches"]
        labels = sum(self.counts.values()) - tokens - patches
        values["tokens_per_second"] = tokens / self.seconds
        values["tflops"] = self.plan.flops.training(tokens, patches, labels) / self.seconds / 1e12  # of all ranks
        values["step_ms"] = 1e3 * self.seconds / self.steps
        values["data_wait_ms"] = 1e3 * self.waited / self.steps
        values["real_tokens"] = tokens / self.steps / self.plan.tokens_per_step
        if self.load is not None and self.entropy is not None:
            per_expert = self.load.sum((1, 2))
            share = per_expert / per_expert.sum(-1, keepdim=True) * per_expert.shape[-1]
            values["max_violation"] = float(share.max() - 1)  # the busiest expert over an even share, of any layer
            values["dead_fraction"] = float((share < 0.01).float().mean())
            values["entropy"] = float(torch.mean(self.entropy)) / tokens
        self._begin()
        return values
