"""How much of the machine's matrix-product rate a training step reaches, and where the rest of its time goes.

    python benchmarks/train_step.py [--recipe TOML] [--deepspeed JSON] [--steps N] [--json FILE] [section.key=value ...]
    deepspeed --num_accelerators 2 benchmarks/train_step.py

Steps run through the real engine on packs of random pictures and text, so that no data is needed. The rate that they
are held against is measured in the same process, interleaved with the steps: every matrix product of the model at its
own shape, forward and both gradients, each weighted by its share of the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import ROOT, Result

from dsmoe_vl.command import leave
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.doctor.timed_step import random_batch
from dsmoe_vl.parallel.device import device_name, has_bf16_unit, use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve


def matrix_products(recipe: Recipe, tokens: int, patches: int, labels: int) -> list[tuple[int, int, int, int]]:
    """Every product of one forward on one rank: (rows, inner width, outer width, how often)."""
    model, vision, moe = recipe.model, recipe.model.vision, recipe.moe
    sparse = model.layers - moe.first_dense_layers
    head_width = model.width_of_head
    rows_per_expert = max(1, tokens * moe.top_k // moe.experts)
    products = [
        (patches, 3 * vision.patch_size**2, vision.width, 1),
        (patches, vision.width, 3 * vision.width, vision.layers),
        (patches, vision.width, vision.width, vision.layers),
        (patches, vision.width, 2 * vision.ffn_width, vision.layers),
        (patches, vision.ffn_width, vision.width, vision.layers),
        (patches // vision.merge**2, vision.width * vision.merge**2, model.width, 1),
        (patches // vision.merge**2, model.width, model.width, 1),
        (tokens, model.width, (model.heads + 2 * model.kv_heads) * head_width, model.layers),
        (tokens, model.heads * head_width, model.width, model.layers),
        (tokens, model.width, 2 * model.ffn_width, moe.first_dense_layers),
        (tokens, model.ffn_width, model.width, moe.first_dense_layers),
        (rows_per_expert, model.width, moe.ffn_width, 2 * sparse * moe.experts),
        (rows_per_expert, moe.ffn_width, model.width, sparse * moe.experts),
        (labels, model.width, recipe.tokenizer.vocab_size, 1),
    ]
    if moe.shared_ffn_width:
        products += [
            (tokens, model.width, 2 * moe.shared_ffn_width, sparse),
            (tokens, moe.shared_ffn_width, model.width, sparse),
        ]
    return [product for product in products if product[3]]


class ProductRate:
    """Times each distinct product of the model, forward and both gradients."""

    def __init__(self, products: list[tuple[int, int, int, int]], device: torch.device, dtype: torch.dtype) -> None:
        self.products = products
        self.operands = [
            [torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (n, k), (m, n))]
            for m, k, n, _ in products
        ]
        self.seconds: list[list[float]] = [[] for _ in products]

    def sample(self, repeats: int = 3) -> None:
        """One more time for every product."""
        for index, (x, w, g) in enumerate(self.operands):
            for _ in range(repeats):
                started = _now(x.device)
                x @ w.t(), g @ w, g.t() @ x
                self.seconds[index].append(_now(x.device) - started)

    def flops_per_second(self) -> float:
        """All products of a step over the time that they alone would take."""
        times = [statistics.median(samples) for samples in self.seconds]
        flops = sum(6.0 * m * k * n * often for m, k, n, often in self.products)
        return flops / sum(t * often for t, (*_, often) in zip(times, self.products, strict=True))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(plan: RunPlan, ranks: Ranks, steps: int, profile: bool) -> dict[str, Any]:
    """Median phases of a step, the product rate and their ratio; on every rank at once, reported by rank 0."""
    from dsmoe_vl.parallel.process_group import HostGroup, start_process_group
    from dsmoe_vl.tasks.caption import CaptionTask
    from dsmoe_vl.training.engine import build_engine
    from dsmoe_vl.training.step import OptimizerStep

    device = use_device(plan.device, ranks)
    start_process_group(ranks, plan.device)
    engine = build_engine(plan, ranks, (CaptionTask.__new__(CaptionTask),))  # its loss needs no tokenizer
    step = OptimizerStep(plan, ranks, engine, HostGroup(), device)
    batches = [random_batch(plan, seed).to(device) for seed in range(4)]
    counts = {name: count * plan.dp_size * plan.accumulation for name, count in batches[0].counts.items()}
    tokens, patches, labels = batches[0].counts["tokens"], len(batches[0].patches), batches[0].counts["caption"]
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    rate = ProductRate(matrix_products(plan.recipe, tokens, patches, labels), device, dtype)
    phases: dict[str, list[float]] = defaultdict(list)

    def one_step(index: int) -> None:
        times = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        for micro in range(plan.accumulation):
            marks = [_now(device)]
            output, stats = engine(batches[(index + micro) % len(batches)])
            loss = step.objective(output, stats, counts, step.load_fraction)
            marks.append(_now(device))
            engine.backward(loss.scalar)
            marks.append(_now(device))
            engine.step()
            marks.append(_now(device))
            for name, begin, end in zip(times, marks, marks[1:], strict=False):
                times[name] += end - begin
        for name, seconds in times.items():
            phases[name].append(seconds)

    for index in range(3):
        one_step(index)
    phases.clear()
    for index in range(steps):
        one_step(index)
        rate.sample()
    median = {name: statistics.median(samples) for name, samples in phases.items()}
    whole = [sum(parts) for parts in zip(*phases.values(), strict=True)]
    flops = plan.accumulation * plan.flops.training(tokens, patches, labels)
    step_seconds, product_rate = statistics.median(whole), rate.flops_per_second()
    forward_backward = median["forward"] + median["backward"]
    result: dict[str, Any] = {
        **setting(plan),
        "threads": torch.get_num_threads(),
        "parameters": plan.parameters.total,
        "active_parameters": plan.parameters.active,
        "steps": steps,
        "tokens_per_second": plan.world_size * plan.accumulation * tokens / step_seconds,
        "step_ms": 1e3 * step_seconds,
        "step_ms_spread": [1e3 * min(whole), 1e3 * max(whole)],
        **{f"{name}_ms": 1e3 * seconds for name, seconds in median.items()},
        "active_tflop_per_rank_step": flops / 1e12,
        "tflops_per_rank": flops / step_seconds / 1e12,
        "product_tflops_per_rank": product_rate / 1e12,
        "step_over_product_rate": flops / step_seconds / product_rate,
        "forward_backward_over_product_rate": flops / forward_backward / product_rate,
    }
    if plan.device == "cuda":
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if profile:
        result["operators_percent"] = _operators(lambda: one_step(0), plan.device)
    engine.destroy()
    return result


def _operators(step: Callable[[], None], device: str) -> dict[str, float]:
    """Shares of one step's time by operator, the largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = {event.key: float(getattr(event, key)) for event in profiler.key_averages()}
    total = sum(times.values())
    largest = sorted(times.items(), key=lambda item: -item[1])[:16]
    return {name: round(100 * value / total, 1) for name, value in largest}


def parse(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "launch/recipes/quickstart.toml")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs/moe.json")
    parser.add_argument("--micro-batch", type=int, help="packs, in place of the JSON's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    parser.add_argument("--no-profile", action="store_true", help="leave out the table of operators")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def plan_of(recipe: Recipe, args: argparse.Namespace, ranks: Ranks) -> RunPlan:
    """The plan of a recipe on this machine. Raises ConfigError."""
    deepspeed, device = load_deepspeed(args.deepspeed), device_name()
    if args.micro_batch:
        deepspeed["train_micro_batch_size_per_gpu"] = args.micro_batch
    return resolve(recipe, deepspeed, ranks.world_size, device=device, bf16_unit=has_bf16_unit(device))


def setting(plan: RunPlan) -> dict[str, Any]:
    """What the figures of a step depend on."""
    return {
        "device": plan.device,
        "ranks": plan.world_size,
        "ep_size": plan.ep_size,
        "zero_stage": plan.zero_stage,
        "precision": plan.precision,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "pack_length": plan.recipe.data.pack_length,
    }


def report(benchmark: str, figures: dict[str, Any], ranks: Ranks, args: argparse.Namespace) -> None:
    """Print the figures, and write them where wanted; rank 0 only."""
    if ranks.rank != 0:
        return
    figures = {"recipe": args.recipe.stem, **figures}
    for name, value in figures.items():
        print(f"{name:36} {value:,.4g}" if isinstance(value, float) else f"{name:36} {value}")
    if args.json:
        Result.now(benchmark, figures).write(args.json)


def main() -> int:
    """Measure one recipe."""
    args, ranks = parse(__doc__), Ranks.discover()
    plan = plan_of(load_recipe(args.recipe, args.overrides), args, ranks)
    report("train_step", measure(plan, ranks, args.steps, not args.no_profile), ranks, args)
    return 0


if __name__ == "__main__":
    leave(main())
