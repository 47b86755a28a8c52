"""The loader's part of benchmarks/data.py: beside a plain webdataset pipeline and decoding alone, and resuming.

Pixels: `plain webdataset` decodes and resizes with Pillow, as most pipelines do; `... our pixels` with this project's
functions, to the same bytes as the loader's.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from turns import Interleaved, ratio

from data_tools.writer import write_index
from dsmoe_vl.config.model import VisionConfig
from dsmoe_vl.config.recipe import DataConfig, Recipe, SourceConfig, TasksConfig
from dsmoe_vl.data.decode import decode_image, fit_grid, resized, to_patches
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.shards.index import ShardIndex, iterate_samples
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.tasks.registry import Encoder, build_tasks

MAX_PATCHES, VISION = 196, VisionConfig(patch_size=16, merge=2)  # of 16 x 16 pixels: about 224 x 224 pixels a photo
Pixels = Callable[[bytes], np.ndarray]


def pillow_pixels(data: bytes) -> np.ndarray:
    """Decoded whole and resized as most pipelines do it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    rows, columns = fit_grid(*image.size, VISION.patch_size, VISION.merge, MAX_PATCHES)
    size = (columns * VISION.patch_size, rows * VISION.patch_size)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def our_pixels(data: bytes, enough: int = MAX_PATCHES * VISION.patch_size**2) -> np.ndarray:
    """As the loader makes them, before they are cut up; with `enough` 0 decoded whole."""
    pixels = decode_image(data, enough)
    rows, columns = fit_grid(pixels.shape[1], pixels.shape[0], VISION.patch_size, VISION.merge, MAX_PATCHES)
    return resized(pixels, rows * VISION.patch_size, columns * VISION.patch_size)


class PlainDecode:
    """A sample of webdataset to pixels and tokens; for its `map`."""

    def __init__(self, pixels: Pixels, tokenizer: Tokenizer) -> None:
        self.pixels, self.tokenizer = pixels, tokenizer

    def __call__(self, sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        json.loads(sample["json"])
        tokens = [*self.tokenizer.encode(sample["txt"].decode()), self.tokenizer.eos]
        return torch.from_numpy(self.pixels(sample["jpg"]).copy()), torch.tensor(tokens)


def plain_pipeline(shards: Path, decode: PlainDecode, workers: int) -> Iterator[Any]:
    """What webdataset's documentation builds: shards shuffled, samples shuffled, decoded, in batches of 16; endless."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=1, nodesplitter=None)
    dataset = dataset.shuffle(256).map(decode).batched(16, collation_fn=list).repeat(nepochs=10**6)
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4))


def time_loader(shards: Path, tokenizer: Path, workers: int, run: Interleaved, samples: int) -> dict[str, float]:
    """Loader against plain pipelines with as many workers, and against decoding alone in as many processes.

    Every stream is endless or as good as: what is timed comes after the first samples, when all are under way.
    """
    torch.set_num_threads(1)
    source = SourceConfig("photos", str(shards))
    data = DataConfig(
        sources=(source,), pack_length=2048, pack_patches=20 * MAX_PATCHES, image_max_patches=MAX_PATCHES,
        lanes=8, lookahead=64, shuffle_block=32, workers=workers,
    )  # fmt: skip
    recipe = replace(Recipe(), data=data, tasks=TasksConfig())
    recipe = replace(recipe, model=replace(recipe.model, vision=VISION))
    words = Tokenizer(tokenizer)
    encode = Encoder(build_tasks(recipe, words))
    loader = Loader(data, data.sources, encode, VISION.patch_size, VISION.merge, 1, 0, 1, 1, 1)
    steps = iter(loader)

    def ours(samples: int) -> int:
        taken = 0
        while taken < samples:
            taken += sum(len(batch.keys) for batch in next(steps))
        return taken

    def take(batches: Iterator[Any], samples: int) -> int:
        taken = 0
        while taken < samples:
            taken += len(next(batches))
        return taken

    memory = [(sample.media, sample.text) for sample in iterate_samples(source)]  # all: a few would stay in the caches
    limit = DataLoader(Endless(memory, words), batch_size=None, num_workers=workers, prefetch_factor=4)
    alone = iter(limit)

    print(f"loader, {workers} workers, {MAX_PATCHES} patches of {VISION.patch_size} pixels:")
    found = run.run(
        {
            "loader": ours,
            "plain webdataset": partial(take, plain_pipeline(shards, PlainDecode(pillow_pixels, words), workers)),
            "plain webdataset, our pixels": partial(
                take, plain_pipeline(shards, PlainDecode(our_pixels, words), workers)
            ),
            "decode, resize and tokenise alone": lambda samples: sum(next(alone) for _ in range(samples // 16)),
        },
        samples,
        lead=min(samples, 96 * workers),
    )
    loader.close()
    psnr = [_psnr(our_pixels(media), pillow_pixels(media)) for media, _ in memory[:64] if media]
    whole = [_psnr(our_pixels(media, 0), pillow_pixels(media)) for media, _ in memory[:64] if media]
    print(f"  PSNR to Pillow: {statistics.median(psnr):.1f} dB, decoded whole {statistics.median(whole):.1f} dB")
    return {
        "loader_over_webdataset": ratio("loader / plain webdataset", found["loader"], found["plain webdataset"]),
        "loader_over_webdataset_same_pixels": ratio(
            "loader / plain webdataset, our pixels", found["loader"], found["plain webdataset, our pixels"]
        ),
        "loader_over_decoding": ratio(
            "loader / decoding alone", found["loader"], found["decode, resize and tokenise alone"]
        ),
        "psnr_db": statistics.median(psnr),
    }


class Endless(torch.utils.data.IterableDataset[int]):
    """Decodes, resizes, cuts up and tokenises samples from memory, and sends nothing but their number, 16 at a time."""

    def __init__(self, samples: list[tuple[bytes | None, str]], tokenizer: Tokenizer) -> None:
        self.samples, self.tokenizer = samples, tokenizer

    def __iter__(self) -> Iterator[int]:
        done, worker = 0, torch.utils.data.get_worker_info()
        first = 0 if worker is None else len(self.samples) * worker.id // worker.num_workers
        while True:
            for media, text in self.samples[first:] + self.samples[:first]:
                assert media is not None
                pixels = decode_image(media, MAX_PATCHES * VISION.patch_size**2)
                grid = fit_grid(pixels.shape[1], pixels.shape[0], VISION.patch_size, VISION.merge, MAX_PATCHES)
                to_patches(pixels, grid, VISION.patch_size, VISION.merge)
                self.tokenizer.encode(text)
                done += 1
                if done % 16 == 0:
                    yield 16


def _psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = np.square(ours.astype(float) - theirs).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def time_resume(folder: Path, repeats: int) -> dict[str, float]:
    """From a state in the middle of an epoch of a million samples to the first batch, and to the first without one."""
    shard = folder / "one"
    shard.mkdir()
    path = shard / "train-00000.tar"
    with webdataset.TarWriter(str(path), mtime=0, encoder=False) as tar:
        for i in range(1000):
            tar.write({"__key__": f"{i}", "txt": b"some words of text that make a caption"})
    row = {"samples": 1000, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rows = []
    for i in range(1000):
        os.link(path, shard / f"link-{i:05}.tar")
        rows.append({"name": f"link-{i:05}.tar", **row})
    write_index(shard, "train", rows)
    source = SourceConfig("million", str(shard))
    data = DataConfig(sources=(source,), pack_length=256, pack_patches=4, lanes=8, workers=0)

    def loader() -> Loader:
        return Loader(data, data.sources, _letters, 16, 2, 1, 0, 1, 1, 1)

    first = loader()
    next(iter(first))
    state = json.loads(json.dumps(first.state_dict()))
    for lane in state["lanes"].values():
        lane["cursors"], lane["taken"], lane["pending"] = [[240, 7]], [240 * 256 + 7], []  # half of an epoch
    seconds: dict[str, list[float]] = {"resume": [], "start": []}
    for _ in range(repeats):
        for name in seconds:
            begun = time.perf_counter()
            fresh = loader()
            if name == "resume":
                fresh.load_state_dict([state])
            next(iter(fresh))
            seconds[name].append(time.perf_counter() - begun)
            fresh.close()
    print(f"resuming in the middle of {ShardIndex.load(shard).samples:,} samples, index and first batch included:")
    for name, values in seconds.items():
        print(f"  {name}: {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    return {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}


def _letters(sample: Any) -> list[Any]:
    from dsmoe_vl.config.task_table import task_number
    from dsmoe_vl.data.segment import Segment

    tokens = np.frombuffer(sample.text.encode(), np.uint8).astype(np.int32)
    return [Segment(task_number("caption"), tokens, tokens.copy(), np.zeros_like(tokens))]
