"""What sparsity costs: a step of the MoE model beside a dense one of equal active FLOPs, and what watching it costs.

    deepspeed --num_accelerators 2 benchmarks/moe_cost.py [--recipe TOML] [--micro-batch N] [--steps N] [--json FILE]

The engines stand in the same processes and take turns, on the same packs; ratios are taken pair by pair. `telemetry` is
what only the logs need: the reduction over ranks, the window, and its share of a log line. Router statistics are timed
too; the balancing terms need most of them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from train_step import parse, plan_of, report, setting

from dsmoe_vl.command import leave
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import L1Config, ObjectiveConfig, Recipe
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.doctor.timed_step import random_batch
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe, the same with the L1 term, and dense with feed-forwards as wide as a token's experts together."""
    model, moe = recipe.model, recipe.moe
    active_width = moe.top_k * moe.ffn_width + moe.shared_ffn_width
    return {
        "dense": replace(
            recipe, model=replace(model, ffn_width=active_width), moe=replace(moe, first_dense_layers=model.layers)
        ),
        "moe": replace(recipe, model=replace(model, ffn_width=active_width)),
        "moe_l1": replace(
            recipe,
            model=replace(model, ffn_width=active_width),
            objective=ObjectiveConfig(l1=L1Config(weight=1e-3)),
        ),
    }


class Variant:
    """One engine; `take` times a step of it."""

    def __init__(self, plan: RunPlan, ranks: Ranks, device: torch.device) -> None:
        from dsmoe_vl.parallel.process_group import HostGroup
        from dsmoe_vl.tasks.caption import CaptionTask
        from dsmoe_vl.training.engine import build_engine
        from dsmoe_vl.training.step import OptimizerStep
        from dsmoe_vl.training.window import Window

        self.plan, self.device = plan, device
        self.engine = build_engine(plan, ranks, (CaptionTask.__new__(CaptionTask),))  # its loss needs no tokenizer
        self.step = OptimizerStep(plan, ranks, self.engine, HostGroup(), device)
        self.window = Window(plan)

    def take(self, batch: Batch, counts: dict[str, int]) -> dict[str, float]:
        """Seconds of the parts of one optimizer step."""
        from dsmoe_vl.training.step import StepResult

        marks = [self._now()]
        output, stats = self.engine(batch)
        loss = self.step.objective(output, stats, counts, self.step.load_fraction)
        self.engine.backward(loss.scalar)
        marks.append(self._now())
        self.engine.step()
        marks.append(self._now())
        layers = [] if stats is None else [RouterStats(*(value.detach() for value in stats))]
        terms, routing = self.step.reduce(dict(loss.terms), layers)
        self.window.add(StepResult(terms, routing, counts, 0.0, 0.0))
        self.window.time(1.0, 0.0)
        marks.append(self._now())
        names = ("forward_backward", "optimizer", "telemetry")
        return {name: end - begin for name, begin, end in zip(names, marks, marks[1:], strict=False)}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def log_line_seconds(variant: Variant, rank: int) -> float:
    """Seconds of closing an interval and writing it to metrics.jsonl, TensorBoard and the terminal."""
    from dsmoe_vl.monitor.run_log import RunLog

    with tempfile.TemporaryDirectory() as folder:
        plan = replace(variant.plan, run_dir=Path(folder), tensorboard_dir=Path(folder) / "tensorboard")
        monitor = RunLog(plan, rank, 0)
        started = time.perf_counter()
        monitor.log(1, variant.window.close())
        seconds = time.perf_counter() - started
        monitor.close()
    return seconds


def statistics_seconds(plan: RunPlan, tokens: int, device: torch.device) -> float:
    """Seconds of one layer's router statistics, forward and backward, as many tokens as a micro-step."""
    from dsmoe_vl.config.task_table import TASKS
    from dsmoe_vl.data.segment import Modality
    from dsmoe_vl.moe.router import Router

    moe = plan.recipe.moe
    router = Router(plan.recipe.model.width, moe.experts, moe.top_k, len(TASKS), len(Modality)).to(device)
    torch.nn.init.normal_(router.weight, std=0.02)
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    routing = router(torch.randn(tokens, plan.recipe.model.width, device=device), ids, ids)
    times = []
    for _ in range(20):
        leaves = routing._replace(
            probabilities=routing.probabilities.detach().requires_grad_(),
            logits=routing.logits.detach().requires_grad_(),
        )
        started = time.perf_counter()
        stats = RouterStats.of(leaves, ids, ids, ids == 0, len(TASKS), len(Modality))
        (stats.probability_sum.square().sum() + stats.z_sum).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(plans: dict[str, RunPlan], ranks: Ranks, steps: int) -> dict[str, Any]:
    """Medians and pair-by-pair ratios; the same work on every rank, reported by rank 0."""
    from dsmoe_vl.parallel.process_group import start_process_group

    plan = plans["moe"]
    device = use_device(plan.device, ranks)
    start_process_group(ranks, plan.device)
    engines = {name: Variant(plan, ranks, device) for name, plan in plans.items()}
    batches = [random_batch(plan, seed).to(device) for seed in range(4)]
    counts = {name: count * plan.dp_size for name, count in batches[0].counts.items()}
    counts["patches"] = len(batches[0].patches) * plan.dp_size
    times: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for index in range(steps + 3):
        for name, engine in engines.items():
            taken = engine.take(batches[index % len(batches)], counts)
            if index >= 3:
                times[name].append(taken)
    log_line = log_line_seconds(engines["moe"], ranks.rank)
    of_statistics = statistics_seconds(plan, batches[0].counts["tokens"], device)

    def spread(values: list[float]) -> list[float]:
        return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]

    def whole(parts: dict[str, float]) -> float:
        return parts["forward_backward"] + parts["optimizer"]

    steps_of = {name: [whole(parts) for parts in found] for name, found in times.items()}
    step = statistics.median(steps_of["moe"])
    sparse_layers = plan.recipe.model.layers - plan.recipe.moe.first_dense_layers
    result: dict[str, Any] = {
        **setting(plan), "steps": steps,
        "flops_per_token": {name: of.flops_per_token for name, of in plans.items()},
        "step_ms": {name: 1e3 * statistics.median(values) for name, values in steps_of.items()},
        # Ratios: median, least, greatest.
        "forward_backward_moe_over_dense": spread([
            a["forward_backward"] / b["forward_backward"] for a, b in zip(times["moe"], times["dense"], strict=True)
        ]),
        "step_moe_over_dense": spread([a / b for a, b in zip(steps_of["moe"], steps_of["dense"], strict=True)]),
        "step_l1_over_moe": spread([a / b for a, b in zip(steps_of["moe_l1"], steps_of["moe"], strict=True)]),
        "optimizer_ms_moe": 1e3 * statistics.median(parts["optimizer"] for parts in times["moe"]),
        "optimizer_ms_l1": 1e3 * statistics.median(parts["optimizer"] for parts in times["moe_l1"]),
        "telemetry_over_step": spread([
            (parts["telemetry"] + log_line / plan.recipe.run.log_every) / step for parts in times["moe"]
        ]),
        "log_line_ms": 1e3 * log_line,
        "router_statistics_over_step": round(of_statistics * sparse_layers / step, 4),
    }  # fmt: skip
    for engine in engines.values():
        engine.engine.destroy()
    return result


def main() -> int:
    """Measure the variants of one recipe."""
    args, ranks = parse(__doc__), Ranks.discover()
    recipes = variants(load_recipe(args.recipe, args.overrides))
    plans = {name: plan_of(recipe, args, ranks) for name, recipe in recipes.items()}
    report("moe_cost", measure(plans, ranks, args.steps), ranks, args)
    return 0


if __name__ == "__main__":
    leave(main())
