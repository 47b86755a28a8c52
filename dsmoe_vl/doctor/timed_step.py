"""Optimizer steps of the real engine on random packs, on some processes of this machine: their time and memory.
`--calibrate` of launch/plan.py and the benchmarks use it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack import assemble, collate
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Segment
from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan

_TEXT_TOKENS = 10  # of a caption
_LIMIT = 300.0  # seconds for all ranks of a measurement


@dataclass(frozen=True)
class Timed:
    """Of rank 0."""

    seconds: float  # of a step: the median
    processor_seconds: float  # likewise; nearly the same for one rank of one thread on an idle machine
    peak_bytes: int  # resident at most, in steps after the first
    tokens: int  # of a micro-step
    patches: int
    labels: int


def random_batch(plan: RunPlan, seed: int, frames: int = 0) -> Batch:
    """Packs of images at the recipe's patch budget, or of videos of so many frames at theirs, each followed by a
    caption, until nothing more fits."""
    recipe, rng = plan.recipe, np.random.default_rng(seed)
    data, vision = recipe.data, recipe.model.vision
    shape, pictures = PackShape.of(recipe), frames or 1
    side = int(((data.frame_max_patches if frames else data.image_max_patches) / vision.merge**2) ** 0.5) * vision.merge
    cells = side * side // vision.merge**2
    vision_tokens = pictures * cells
    length = vision_tokens + _TEXT_TOKENS
    fitting = min(shape.length // length, shape.patches // (pictures * side * side))
    kind = Modality.VIDEO if frames else Modality.IMAGE
    packs = []
    for _ in range(plan.micro_batch):
        segments = []
        for _ in range(fitting):
            patches = rng.integers(0, 256, (pictures * side * side, 3 * vision.patch_size**2), dtype=np.uint8)
            tokens = rng.integers(10, recipe.tokenizer.vocab_size, length).astype(np.int32)
            labels = np.where(np.arange(length) < vision_tokens - 1, IGNORE, tokens).astype(np.int32)
            modality = np.where(np.arange(length) < vision_tokens, kind, Modality.TEXT).astype(np.int32)
            shown = [
                Picture(part, (side, side), 0.5 * i if frames else -1.0, np.arange(cells, dtype=np.int32) + i * cells)
                for i, part in enumerate(np.split(patches, pictures))
            ]
            segments.append(Segment(task_number("caption"), tokens, labels, modality, shown))
        packs.append(assemble(segments, shape))
    return collate(packs)


def time_steps(plan: RunPlan, steps: int, frames: int = 0) -> Timed:
    """Steps of a plan for CPUs, on as many processes as it has ranks, of one thread each, on images, or on videos of so
    many frames. Raises DsmoeVlError."""
    return on_ranks(plan.world_size, _steps, plan, steps, frames)


def on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(ranks, *arguments)` returns on rank 0 of new processes with a process group. Raises DsmoeVlError if
    one of them fails or all take too long; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in threads}
    os.environ |= threads  # torch and DeepSpeed read them when they are imported
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_rank, args=(Ranks(rank, world_size, rank, world_size), port, sender, work, arguments))
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        sender.close()
        if not receiver.poll(_LIMIT):
            raise DsmoeVlError(f"{world_size} processes took more than {_LIMIT:.0f} s for a measurement; try again")
        return receiver.recv()
    except EOFError:
        raise DsmoeVlError("a process of a measurement ended early; its message stands above") from None
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for process in processes:
            if process.pid is not None:
                process.join(10)
                process.kill()
                process.join()


def _rank(ranks: Ranks, port: str, sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from dsmoe_vl.parallel.process_group import end_process_group, start_process_group

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls a collective by its deprecated name
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    use_device("cpu", ranks)
    start_process_group(ranks, "cpu")
    found = work(ranks, *arguments)
    if ranks.rank == 0:
        sender.send(found)
    end_process_group()


def _steps(ranks: Ranks, plan: RunPlan, steps: int, frames: int) -> Timed:
    from dsmoe_vl.parallel.process_group import HostGroup
    from dsmoe_vl.tasks.caption import CaptionTask
    from dsmoe_vl.training.engine import build_engine
    from dsmoe_vl.training.step import OptimizerStep

    engine = build_engine(plan, ranks, (CaptionTask.__new__(CaptionTask),))  # its loss needs no tokenizer
    step = OptimizerStep(plan, ranks, engine, HostGroup(), torch.device("cpu"))
    batches = [random_batch(plan, seed, frames) for seed in range(plan.accumulation)]
    clocks = []
    for number in range(steps + 2):
        if number == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started = time.perf_counter(), time.process_time()
        shared = step.share(batches)
        step(shared.batches, shared.counts)
        clocks.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    batch = batches[0]
    labels = int((batch.labels != IGNORE).sum())
    seconds, processor_seconds = (statistics.median(times) for times in zip(*clocks[2:], strict=True))
    sizes = len(batch.tokens), len(batch.patches), labels
    return Timed(seconds, processor_seconds, _peak_bytes(), *sizes)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
