"""Loaders over small shards, and which samples come out of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.decode import decode_image, fit_grid, to_patches
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Modality, Picture, Segment
from tests.support.tars import write_shards

DATA = DataConfig(pack_length=64, pack_patches=4, lanes=8, lookahead=4, shuffle_block=8, workers=0)
COUNTS = [37, 0, 64, 12]  # samples of the shards of source a
Identity = tuple[int, int, int, int]  # source, epoch, shard, sample


def two_sources(folder: Path) -> tuple[SourceConfig, ...]:
    """Source a with several shards and three times the weight of source b, which is small; without media to decode."""
    write_shards(folder / "a", COUNTS)
    write_shards(folder / "b", [5])
    return (SourceConfig("a", str(folder / "a"), 3.0), SourceConfig("b", str(folder / "b"), 1.0))


def encode(sample: Sample) -> list[Segment]:
    """A segment of 6 to 30 tokens that begins with the sample's identity."""
    name, shard, number = sample.key.split("-")
    length = 6 + (int(shard) * 31 + int(number) * 17) % 25
    tokens = np.zeros(length, np.int32)
    tokens[:4] = ord(name[0]) - ord("a"), sample.epoch, int(shard), int(number)
    tokens[4] = torch.get_num_threads()
    return [Segment(task_number("caption"), tokens, tokens.copy(), np.zeros(length, np.int32))]


def encode_picture(sample: Sample) -> list[Segment]:
    """A still image, one token a cell."""
    assert sample.media is not None
    image = decode_image(sample.media)
    grid = fit_grid(image.shape[1], image.shape[0], 8, 2, 16)
    cells = np.arange(grid[0] * grid[1] // 4, dtype=np.int32)
    tokens = np.full(len(cells), 5, np.int32)
    image_modality = np.full(len(cells), Modality.IMAGE, np.int32)
    pictures = [Picture(to_patches(image, grid, 8, 2), grid, -1.0, cells)]
    return [Segment(task_number("caption"), tokens, tokens, image_modality, pictures)]


def encode_with_a_bug(sample: Sample) -> list[Segment]:
    raise ZeroDivisionError("a bug in encode")


def identities(batch: Batch) -> list[Identity]:
    starts = batch.cu_segments[:-1].tolist()
    rows = [batch.tokens[start : start + 4].tolist() for start in starts if batch.real[start]]
    return [(source, epoch, shard, number) for source, epoch, shard, number in rows]


def loaders(
    sources: tuple[SourceConfig, ...], ranks: int, workers: int = 0, packs_a_step: int = 8, seed: int = 1
) -> list[Loader]:
    """All ranks of one topology; a step has `packs_a_step` packs whatever the number of ranks."""
    data = dataclasses.replace(DATA, workers=workers)
    return [
        Loader(data, sources, encode, 16, 2, seed, rank, ranks, micro_batch=2, accumulation=packs_a_step // 2 // ranks)
        for rank in range(ranks)
    ]


def take(world: list[Loader], steps: int) -> list[list[Identity]]:
    """What all ranks together see in each of the next steps, sorted; workers are ended."""
    streams = [iter(loader) for loader in world]
    seen = []
    for _ in range(steps):
        batches = [batch for stream in streams for batch in next(stream)]
        seen.append(sorted(one for batch in batches for one in identities(batch)))
    for loader in world:
        loader.close()
    return seen


def states_of(world: list[Loader]) -> list[dict]:
    return json.loads(json.dumps([loader.state_dict() for loader in world]))
