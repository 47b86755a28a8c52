"""What watching a training costs: steps with everything that a default run shows, beside steps without.

    deepspeed --num_accelerators 2 benchmarks/monitoring.py [--recipe TOML] [--micro-batch N] [--steps N] [--json FILE]

One engine takes turns, `run.log_every` steps with and as many without, on the same packs; `--steps` counts such pairs.
The watched ones add up the window and the recorder, read the gradient once more for its norms by part, write
metrics.jsonl, TensorBoard and a line, and when due the routers' record with its picture. Single parts are timed by
themselves, too. Held-out samples are no part of a step: they are drawn when a checkpoint is written.
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
from dsmoe_vl.doctor.timed_step import random_batch
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan


class Bench:
    """An engine and a monitor of a run that leaves nothing behind."""

    def __init__(self, plan: RunPlan, ranks: Ranks) -> None:
        from dsmoe_vl.monitor.recorder import RouterRecorder
        from dsmoe_vl.monitor.run_log import RunLog
        from dsmoe_vl.parallel.process_group import HostGroup, start_process_group
        from dsmoe_vl.tasks.caption import CaptionTask
        from dsmoe_vl.training.engine import build_engine
        from dsmoe_vl.training.step import OptimizerStep
        from dsmoe_vl.training.window import Window

        self.plan, self.device = plan, use_device(plan.device, ranks)
        start_process_group(ranks, plan.device)
        self.engine = build_engine(plan, ranks, (CaptionTask.__new__(CaptionTask),))  # its loss needs no tokenizer
        self.take_step = OptimizerStep(plan, ranks, self.engine, HostGroup(), self.device)
        self.batches = [random_batch(plan, seed) for seed in range(4)]
        self.window, self.monitor = Window(plan), RunLog(plan, ranks.rank, 0)
        self.recorder = RouterRecorder(plan, 0) if ranks.rank == 0 else None
        self.step = 0  # watched ones
        self.parts: dict[str, list[float]] = {"adding_up": [], "log_line": [], "router_record": []}

    def without(self) -> float:
        """Seconds of an interval of bare steps."""
        started = self._now()
        for index in range(self.plan.recipe.run.log_every):
            self._take(index, False)
        self.take_step.clock.read()
        return self._now() - started

    def watched(self) -> float:
        """Seconds of an interval of watched steps, with all that is due in it."""
        run, started = self.plan.recipe.run, self._now()
        for index in range(run.log_every):
            self.step += 1
            logs = self.step % run.log_every == 0
            begun = time.perf_counter()
            result = self._take(index, logs)
            seconds = time.perf_counter() - begun
            begun = time.perf_counter()
            self.window.add(result)
            self.window.time(seconds, 0.0)
            if self.recorder is not None and result.routing is not None:
                self.recorder.add(result.routing, result.counts)
            self.parts["adding_up"].append(time.perf_counter() - begun)
            if logs:
                begun = time.perf_counter()
                self.monitor.log(self.step, self.window.close(self.take_step.clock.read()))
                self.parts["log_line"].append(time.perf_counter() - begun)
            if self.recorder is not None and self.step % run.router_every == 0:
                begun = time.perf_counter()
                self.monitor.log_router(self.recorder.record(self.step))
                self.parts["router_record"].append(time.perf_counter() - begun)
        return self._now() - started

    def _take(self, index: int, part_norms: bool) -> Any:
        first = index * self.plan.accumulation
        batches = [self.batches[(first + micro) % len(self.batches)] for micro in range(self.plan.accumulation)]
        shared = self.take_step.share(batches)
        return self.take_step(shared.batches, shared.counts, part_norms)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(plan: RunPlan, ranks: Ranks, pairs: int) -> dict[str, Any]:
    """Medians and pair-by-pair ratios; the same work on every rank, reported by rank 0."""
    bench = Bench(plan, ranks)
    bench.without(), bench.watched()
    bare, watched = list[float](), list[float]()
    for index in range(pairs):
        order = (bench.without, bench.watched) if index % 2 else (bench.watched, bench.without)
        for take in order:
            (bare if take == bench.without else watched).append(take())
    run = plan.recipe.run
    step = statistics.median(bare) / run.log_every
    medians = {name: statistics.median(times) if times else 0.0 for name, times in bench.parts.items()}
    timed = medians["adding_up"] + medians["log_line"] / run.log_every + medians["router_record"] / run.router_every
    ratios = sorted(a / b for a, b in zip(watched, bare, strict=True))
    result: dict[str, Any] = {
        **setting(plan),
        "log_every": run.log_every, "router_every": run.router_every, "pairs": pairs, "step_ms": 1e3 * step,
        # Of the ratios of pairs: the median, and the half of them in the middle.
        "watched_over_bare": [round(ratios[len(ratios) * quarter // 4], 4) for quarter in (2, 1, 3)],
        "watched_over_bare_of_medians": statistics.median(watched) / statistics.median(bare),
        **{f"{name}_ms": 1e3 * seconds for name, seconds in medians.items()},
        "parts_over_step": timed / step,  # without the norms by part, which are inside a step
    }  # fmt: skip
    bench.monitor.close()
    bench.engine.destroy()
    return result


def main() -> int:
    """Measure one recipe."""
    args, ranks = parse(__doc__), Ranks.discover()
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(load_recipe(args.recipe, args.overrides), args, ranks)
        place = Path(folder)
        plan = replace(plan, run_dir=place, tensorboard_enabled=True, tensorboard_dir=place / "tensorboard")
        report("monitoring", measure(plan, ranks, args.steps), ranks, args)
    return 0


if __name__ == "__main__":
    leave(main())
