"""One rank of a run that only reads, for tests that kill it: what it consumed goes to a log, its position to files.

A step is logged before its state is saved, so a log may know more than the states; what follows the newest step that
all ranks have saved counts as never consumed.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmoe_vl.config.model import ModelConfig
from dsmoe_vl.config.model import VisionConfig as Vision
from dsmoe_vl.config.recipe import DataConfig, Recipe, TasksConfig
from dsmoe_vl.config.task_table import RetrievalConfig, SummaryConfig, task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import IGNORE, Modality, Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.files import write_json
from dsmoe_vl.tasks.registry import Encoder, build_tasks

MARK = 1 << 20  # a token that no tokenizer has; the four tokens after it name a sample
Identity = tuple[int, int, int, int]  # source, epoch, shard, sample


@dataclass(frozen=True)
class Run:
    """All that the order of the samples is a function of."""

    data: DataConfig
    seed: int
    tokenizer: Path


@dataclass(frozen=True)
class Topology:
    """What it is not a function of."""

    ranks: int
    workers: int  # of a rank
    accumulation: int  # packs a step and rank


@dataclass(frozen=True)
class Reading:
    """One life of one rank: which one, from where, and how far."""

    folder: Path  # of the life
    rank: int
    states: list[dict[str, Any]]  # of all ranks of the life before; none: from the beginning
    stop: int  # packs of the whole run after which to end
    pause_seconds: float  # what a training step would take
    limit_seconds: float
    start_method: str = "fork"  # of its workers


class Marked:
    """The tasks' segments, and one more of text that tells which sample they are of. Without media that one alone."""

    def __init__(self, run: Run) -> None:
        recipe = Recipe(
            model=ModelConfig(vision=Vision(patch_size=8, merge=2)),
            tasks=TasksConfig(retrieval=RetrievalConfig(weight=1.0), summary=SummaryConfig(weight=1.0)),
            data=run.data,
        )
        self.names = [source.name for source in run.data.sources]
        self.encoder = Encoder(build_tasks(recipe, Tokenizer(run.tokenizer)))

    def __call__(self, sample: Sample) -> list[Segment]:
        name, shard, number = sample.key.split("-")
        assert name == sample.source.name
        tokens = np.full(5 + len(sample.text) % 23, 7, np.int32)
        tokens[:5] = MARK, self.names.index(name), sample.epoch, int(shard), int(number)
        text = np.full_like(tokens, Modality.TEXT)
        mark = Segment(task_number("caption"), tokens, np.full_like(tokens, IGNORE), text)
        return [mark, *(self.encoder(sample) if sample.media is not None else ())]


def identities(batch: Batch) -> list[Identity]:
    """The samples of a batch, in order."""
    at = (batch.tokens == MARK).nonzero().squeeze(1)
    rows = batch.tokens[at[:, None] + torch.arange(1, 5)].tolist()
    return [(source, epoch, shard, number) for source, epoch, shard, number in rows]


def fingerprint(batch: Batch) -> int:
    """Of everything that a model would see."""
    crc = 0
    for value in vars(batch).values():
        crc = zlib.crc32(value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode(), crc)
    return crc


def open_loader(run: Run, topology: Topology, rank: int, quarantine: Path | None = None) -> Loader:
    """The loader of one rank; its batches are single packs."""
    data = replace(run.data, workers=topology.workers)
    return Loader(
        data, data.sources, Marked(run), 8, 2, run.seed, rank, topology.ranks,
        micro_batch=1, accumulation=topology.accumulation, quarantine=quarantine,
    )  # fmt: skip


def packs_of(loader: Loader, rank: int, ranks: int) -> Iterator[list[tuple[int, list[Identity], int]]]:
    """Of every step this rank's packs: their number in the run, samples and fingerprint."""
    before = loader.state_dict()["packs"]
    for batches in loader:
        yield [(before + rank + i * ranks, identities(one), fingerprint(one)) for i, one in enumerate(batches)]
        before = loader.state_dict()["packs"]


def read(run: Run, topology: Topology, reading: Reading, alive: Connection) -> None:
    """The life of one rank, in a process of its own. `alive` is kept open by it and its workers alone."""
    multiprocessing.set_start_method(reading.start_method, force=True)
    out = (reading.folder / f"out_{reading.rank}").open("w")
    os.dup2(out.fileno(), sys.stderr.fileno())
    faulthandler.dump_traceback_later(reading.limit_seconds, exit=True, file=sys.stderr)
    loader = open_loader(run, topology, reading.rank, reading.folder / f"quarantine_{reading.rank}.jsonl")
    if reading.states:
        loader.load_state_dict(reading.states)
    with closing(loader), (reading.folder / f"log_{reading.rank}.jsonl").open("w") as log:
        for step, packs in enumerate(packs_of(loader, reading.rank, topology.ranks), 1):
            workers = [child.pid for child in multiprocessing.active_children()]
            log.write(json.dumps({"step": step, "packs": packs, "workers": workers}) + "\n")
            log.flush()
            time.sleep(reading.pause_seconds)
            state = loader.state_dict()
            save_state(reading.folder, step, reading.rank, state)
            if state["packs"] >= reading.stop:
                break


def save_state(folder: Path, step: int, rank: int, state: dict[str, Any]) -> None:
    write_json(folder / f"state_{step:04d}_{rank}.json", state)


def newest_step(folder: Path, ranks: int) -> int:
    """The newest step that all ranks saved, 0 for none."""
    saved = [{path.name.split("_")[1] for path in folder.glob(f"state_*_{rank}.json")} for rank in range(ranks)]
    return max((int(step) for step in set.intersection(*saved)), default=0)
