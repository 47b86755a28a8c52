"""A small synthetic dataset for a first run and for tests: scenes and videos whose captions are exactly true.

Evaluation splits have only combinations of shape, colour and size (in videos, motion) that do not occur in training.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.parallel import default_workers
from data_tools.synthetic.films import film
from data_tools.synthetic.scenes import scene
from data_tools.writer import ShardWriter
from dsmoe_vl.command import run
from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.errors import DataError

SAMPLES_PER_SHARD = 500
_CHUNK = 64  # samples that a process makes at a time

Draw = Callable[[np.random.Generator, bool, int, int], tuple[bytes, dict[str, Any]]]


def generate(
    output: Path,
    images: int = 8000,
    videos: int = 1200,
    eval_images: int = 600,
    eval_videos: int = 100,
    size: int = 64,
    max_objects: int = 2,
    seed: int = 1,
) -> None:
    """Write the shard folders images_train, images_eval, videos_train and videos_eval into `output`.

    The same arguments give the same bytes, and sample i does not depend on the counts. A folder with a count of 0 is
    left out. The folders appear when all are complete.

    Args:
        size: pixels, the longer side of an image and both sides of a video; a multiple of 16, at least 48.
        max_objects: shapes in a scene, 1 or 2.

    Raises:
        DataError: bad arguments, or a folder that exists already.
    """
    if size < 48 or size % 16:
        raise DataError(f"--size {size}: give a multiple of 16 that is at least 48, else shapes look alike")
    if max_objects not in (1, 2):
        raise DataError(f"--max-objects {max_objects}: a scene has 1 or 2 shapes")
    if seed < 0:
        raise DataError(f"--seed {seed}: cannot be negative")
    kinds: list[tuple[str, str, Draw, str, bool, int]] = [
        ("images_train", "--images", scene, "jpg", False, images),
        ("images_eval", "--eval-images", scene, "jpg", True, eval_images),
        ("videos_train", "--videos", film, "mp4", False, videos),
        ("videos_eval", "--eval-videos", film, "mp4", True, eval_videos),
    ]
    for name, option, *_, count in kinds:
        if count < 0:
            raise DataError(f"{option} {count}: a number of samples cannot be negative")
        if (output / name).exists():
            raise DataError(f"{output / name} exists already: delete it first, or choose another --output")
    unfinished = output / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    # Spawned: a trainer that makes its default data has threads, which a fork does not copy.
    pool = ProcessPoolExecutor(default_workers(), multiprocessing.get_context("spawn"))
    try:
        for stream, (name, _, draw, media_type, held_out, count) in enumerate(kinds):
            if count == 0:
                continue
            one = partial(_sample, draw, seed, stream, held_out, size, max_objects)
            # Starting a process takes longer than making a few samples.
            samples = pool.map(one, range(count), chunksize=_CHUNK) if count > _CHUNK else map(one, range(count))
            with ShardWriter(unfinished / name, "eval" if held_out else "train", SAMPLES_PER_SHARD) as writer:
                for i, (media, meta) in enumerate(tqdm(samples, name, count, unit="sample", disable=None, leave=False)):
                    key = f"{name}-{i:07d}"
                    kind = "video" if media_type == "mp4" else "image"
                    tasks = [spec.name for spec in TASKS if spec.qualifies(kind, meta["captions"], meta)]
                    meta |= {"id": key, "source": "synthetic", "tasks": tasks}
                    writer.write(key, media, media_type, meta["captions"][0], meta)
    finally:
        pool.shutdown(cancel_futures=True)
    for folder in unfinished.iterdir():
        folder.rename(output / folder.name)
    unfinished.rmdir()


def _sample(
    draw: Draw, seed: int, stream: int, held_out: bool, size: int, max_objects: int, i: int
) -> tuple[bytes, dict[str, Any]]:
    return draw(np.random.default_rng([seed, stream, i]), held_out, size, max_objects)


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets one folder of shards per split")
    parser.add_argument("--images", type=int, default=8000, metavar="N", help="training images (%(default)s)")
    parser.add_argument("--videos", type=int, default=1200, metavar="N", help="training videos (%(default)s)")
    parser.add_argument("--eval-images", type=int, default=600, metavar="N", help="held-out images (%(default)s)")
    parser.add_argument("--eval-videos", type=int, default=100, metavar="N", help="held-out videos (%(default)s)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="longer side (%(default)s)")
    parser.add_argument(
        "--max-objects", type=int, default=2, metavar="K", help="shapes in a scene, 1 or 2 (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    given = parser.parse_args(arguments)

    def command() -> int:
        generate(**vars(given))
        print(f"wrote {given.images} + {given.eval_images} images and {given.videos} + {given.eval_videos} videos "
              f"(training + held-out) to {given.output}")  # fmt: skip
        return 0

    return run(command)
