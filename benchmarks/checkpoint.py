"""What a checkpoint costs: time that training stands still, bandwidth beside plain files, memory of every rank.

    deepspeed --num_accelerators 2 benchmarks/checkpoint.py [--zero 2] [--json FILE] [section.key=value ...]

A model of the recipe large.toml with all its widths, but few layers and experts, on random packs through the real
engine: some 350 M parameters on a CPU in fp32; other sizes with settings of the recipe. Memory is resident memory: at
its peak in each phase, over what the rank keeps after the start, or later after three steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from memory import Memory
from record import ROOT, Result
from train_step import random_batch, setting

from dsmoe_vl.checkpoint import training_state
from dsmoe_vl.checkpoint.manifest import read_manifest
from dsmoe_vl.checkpoint.training_state import Saver, restore
from dsmoe_vl.command import leave
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.parallel.device import device_name, has_bf16_unit, use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.training.engine import build_engine
from dsmoe_vl.training.step import OptimizerStep

_SETTINGS = (
    "model.layers=2", "model.vision.layers=3", "moe.experts=32", "data.pack_length=128", "data.pack_patches=400",
    "data.image_max_patches=100", "data.frame_max_patches=100", "data.video_frames=4", "data.workers=0",
)  # fmt: skip
_STEPS = 5
_GIB = 2**30
_CHUNK = 1 << 24


def plan_of(args: argparse.Namespace, ranks: Ranks, folder: Path) -> RunPlan:
    """The plan of the model. Its runs are in `folder`."""
    recipe = load_recipe(ROOT / "launch/recipes/large.toml", (*_SETTINGS, *args.overrides))
    recipe = replace(recipe, run=replace(recipe.run, directory=str(folder), name="run"))
    deepspeed = load_deepspeed(ROOT / "ds_configs/moe_zero3.json")
    deepspeed |= {"gradient_accumulation_steps": 1, "zero_optimization": {"stage": args.zero}}
    deepspeed["expert_parallel"] = {"enabled": True, "autoep_size": ranks.world_size}
    device = device_name()
    return resolve(recipe, deepspeed, ranks.world_size, device=device, bf16_unit=has_bf16_unit(device))


class Pieces:
    """Stands for the tokenizer, whose file a save copies and does not read."""

    sha256, path, vocabulary = "none", __file__, SimpleNamespace(file_name="tokenizer.model")


def measure(args: argparse.Namespace, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The figures of all ranks."""
    from dsmoe_vl.parallel.process_group import HostGroup, start_process_group

    plan, memory = plan_of(args, ranks, folder), Memory()
    device = use_device(plan.device, ranks)
    start_process_group(ranks, plan.device)
    host = HostGroup()
    batch = random_batch(plan, seed=1).to(device)
    before = memory.read("VmRSS")

    def build() -> tuple[Any, OptimizerStep]:
        engine = build_engine(plan, ranks, (CaptionTask.__new__(CaptionTask),))  # its loss needs no tokenizer
        return engine, OptimizerStep(plan, ranks, engine, host, device)

    with memory.phase("starting"):
        engine, take_step = build()
    started = memory.read("VmRSS")

    def step() -> float:
        began = time.perf_counter()
        shared = take_step.share([batch])
        take_step(shared.batches, shared.counts)
        return time.perf_counter() - began

    for _ in range(3):
        step()
    kept = memory.read("VmRSS")
    saver = Saver(plan, ranks, host, Pieces())  # type: ignore[arg-type]
    usual = statistics.median(step() for _ in range(_STEPS))
    found: dict[str, Any] = {"step_seconds": usual}
    room = training_state.free_host_bytes
    blocked: dict[str, float] = {}
    waits: list[float] = []  # of updates, for the copies

    def before_update() -> None:
        began = time.perf_counter()
        saver.before_update()
        waits.append(time.perf_counter() - began)

    take_step.before_update = before_update
    for name, free in (("waiting", lambda: 0), ("in the background", room)):
        training_state.free_host_bytes = free  # without room for copies, training waits
        host.barrier()
        with memory.phase(f"saving, {name}"):
            began = time.perf_counter()
            saver.begin(engine, 3, None, {})
            blocked[name] = time.perf_counter() - began
            during = []
            waits.clear()
            while name != "waiting" and host.max(int(saver.is_writing)):
                during.append(step())
            blocked[name] += sum(waits)
            began = time.perf_counter()
            path = saver.finish()
            blocked[name] += time.perf_counter() - began
            found[f"save_seconds_{name}"] = blocked[name]
        if during:
            found["steps_during_a_save"] = len(during)
            found["step_over_usual_during_a_save"] = (statistics.mean(during) - statistics.mean(waits)) / usual
    found["blocked_share"] = blocked["in the background"] / blocked["waiting"]
    files = [file for file in sorted(path.iterdir()) if f"-{ranks.rank + 1:05d}-of-" in file.name]
    size = sum(file.stat().st_size for file in files)
    found["bytes"] = size
    plain = folder / f"plain_{ranks.rank}"
    found["write_over_plain"] = _alone(host, lambda: _write_plain(plain, size)) / blocked["waiting"]
    manifest = read_manifest(path)
    assert manifest is not None
    with memory.phase("loading"):
        found["load_seconds"] = _alone(host, lambda: restore(path, manifest, plan, ranks, engine, device))
    found["read_over_plain"] = _alone(host, lambda: _read_plain(files)) / found["load_seconds"]
    engine.destroy()
    saver.close()
    found["kept_gib"], found["started_gib"] = kept / _GIB, started / _GIB
    left = {"starting": started}
    found["peak_over_kept"] = {
        name: (peak - before) / (left.get(name, kept) - before) for name, peak in memory.peaks.items()
    }
    found["peak_gib"] = {name: peak / _GIB for name, peak in memory.peaks.items()}
    return {**setting(plan), "parameters": plan.parameters.total, "of_ranks": host.gather(found)}


def _alone(host: Any, action: Callable[[], Any]) -> float:
    """Seconds of an action that all ranks begin together."""
    host.barrier()
    began = time.perf_counter()
    action()
    host.barrier()
    return time.perf_counter() - began


def _write_plain(file: Path, size: int) -> None:
    chunk = torch.randint(0, 256, (_CHUNK,), dtype=torch.uint8).numpy().data
    with file.open("wb") as out:
        for _ in range(size // _CHUNK):
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())


def _read_plain(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as content:
            while content.read(_CHUNK):
                pass


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, default=2, choices=range(4))
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; a temporary one if not given")
    parser.add_argument("--json", type=Path, help="the result file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_args()
    ranks = Ranks.discover()
    folder = (args.folder or Path(tempfile.gettempdir())) / f"checkpoint_benchmark_{os.getppid()}"
    try:
        found = measure(args, ranks, folder)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.rank == 0:
        print(json.dumps(found, indent=1))
        if args.json:
            Result.now("checkpoint", found).write(args.json)
    return 0


if __name__ == "__main__":
    leave(main())
