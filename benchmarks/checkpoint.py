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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from memory import Memory
from record import ROOT, Result
from train_step import setting

from dsmoe_vl.checkpoint import training_state
from dsmoe_vl.checkpoint.manifest import read_manifest
from dsmoe_vl.checkpoint.training_state import Saver, restore
from dsmoe_vl.command import leave
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.doctor.timed_step import random_batch
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
_PAIRS = 3  # of plain files and of checkpoints, in turn
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
    saver.prepare(engine)
    usual = statistics.median(step() for _ in range(_STEPS))
    found: dict[str, Any] = {"step_seconds": usual}
    with no_room(), memory.phase("saving, waiting"):
        path = waiting_save(saver, engine, 1)
    files = [file for file in sorted(path.iterdir()) if f"-{ranks.rank + 1:05d}-of-" in file.name]
    size = found["bytes"] = sum(file.stat().st_size for file in files)
    written, saved, read, loaded = _Times(host), _Times(host), _Times(host), _Times(host)
    exchanged: list[float] = []
    plain, numbers = folder / f"plain_{ranks.rank}", count(2)
    manifest = read_manifest(path)
    assert manifest is not None
    for _ in range(_PAIRS):
        written.add(lambda: _write_plain(plain, size))
        plain.unlink()
        with no_room():
            saved.add(lambda: waiting_save(saver, engine, next(numbers)))
        _forget(files)
        read.add(lambda: _read_plain(files))
        _forget(files)
        with memory.phase("loading"), _timing(training_state, "after_loading", exchanged):
            loaded.add(lambda: restore(path, manifest, plan, ranks, engine))
    found |= {"save_seconds_waiting": saved.median, "load_seconds": loaded.median}
    found["of_it_exchange_seconds"] = statistics.median(exchanged)
    found["write_over_plain"] = written.median / saved.median
    found["read_over_plain"] = read.median / loaded.median
    with memory.phase("saving, in the background"):
        blocked, during = _in_background(saver, take_step, step, next(numbers))
    found["save_seconds_in the background"] = blocked
    if during:  # else the model is so small that the files were there at once
        found["steps_during_a_save"] = len(during)
        found["step_over_usual_during_a_save"] = statistics.mean(during) / usual
    found["blocked_share"] = found["save_seconds_in the background"] / saved.median
    engine.destroy()
    saver.close()
    found["kept_gib"], found["started_gib"] = kept / _GIB, started / _GIB
    left = {"starting": started}
    found["peak_over_kept"] = {
        name: (peak - before) / (left.get(name, kept) - before) for name, peak in memory.peaks.items()
    }
    found["peak_gib"] = {name: peak / _GIB for name, peak in memory.peaks.items()}
    return {**setting(plan), "parameters": plan.parameters.total, "of_ranks": host.gather(found)}


@contextmanager
def no_room() -> Iterator[None]:
    """Without room for copies, training waits for a save."""
    usual = training_state.free_host_bytes
    training_state.free_host_bytes = lambda: 0
    yield
    training_state.free_host_bytes = usual


def waiting_save(saver: Saver, engine: Any, step: int) -> Path:
    """The folder of a checkpoint."""
    saver.begin(engine, step, {}, {})
    return saver.finish()


def _in_background(
    saver: Saver, take_step: OptimizerStep, step: Callable[[], float], number: int
) -> tuple[float, list[float]]:
    """Seconds that training stands still for a save, and those of each step beside it without them."""
    blocked: list[float] = []
    waits: list[float] = []  # of updates, for the copies
    during: list[float] = []
    with _timing(saver, "begin", blocked), _timing(saver, "finish", blocked), _timing(saver, "before_update", waits):
        take_step.before_update = saver.before_update
        saver.begin(take_step.engine, number, {}, {})
        while take_step.host.max(int(saver.is_writing)):
            during.append(step() - waits[-1])
        saver.finish()
    return sum(blocked) + sum(waits), during


@contextmanager
def _timing(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Add the duration of every call of a function of `owner` to `seconds`."""
    usual = getattr(owner, name)

    def timed(*args: Any, **settings: Any) -> Any:
        began = time.perf_counter()
        try:
            return usual(*args, **settings)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, timed)
    yield
    setattr(owner, name, usual)


class _Times:
    """Seconds of actions that all ranks begin and end together."""

    def __init__(self, host: Any) -> None:
        self._host, self._seconds = host, list[float]()

    def add(self, action: Callable[[], Any]) -> None:
        """Time one."""
        self._host.barrier()
        began = time.perf_counter()
        action()
        self._host.barrier()
        self._seconds.append(time.perf_counter() - began)

    @property
    def median(self) -> float:
        """Of all."""
        return statistics.median(self._seconds)


def _forget(files: list[Path]) -> None:
    """Drop files from the page cache: a checkpoint is loaded after a start."""
    for file in files:
        with file.open("rb") as content:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
    args = parser.parse_intermixed_args()
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
