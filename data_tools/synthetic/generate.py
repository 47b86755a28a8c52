"""A small synthetic dataset for a first run and for tests: scenes and videos whose captions are exactly true.

Evaluation splits have only combinations of shape, colour and size (in videos, motion) that do not occur in training.
With --speech every sample also has its first caption as a recording, by voices that do not occur in training either.
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
from data_tools.synthetic.voices import Voice, require_speech, spoken
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
    speech: bool = False,
) -> None:
    """Write the shard folders images_train, images_eval, videos_train and videos_eval into `output`.

    The same arguments give the same bytes, and sample i does not depend on the counts. A folder with a count of 0 is
    left out. The folders appear when all are complete.

    Args:
        size: pixels, the longer side of an image and both sides of a video; a multiple of 16, at least 48.
        max_objects: shapes in a scene, 1 or 2.
        speech: every sample also has its first caption as a recording; all else of it is the same.

    Raises:
        DataError: bad arguments, a folder that exists already, or no espeak-ng to speak with.
    """
    if size < 48 or size % 16:
        raise DataError(f"--size {size}: give a multiple of 16 that is at least 48, else shapes look alike")
    if max_objects not in (1, 2):
        raise DataError(f"--max-objects {max_objects}: a scene has 1 or 2 shapes")
    if seed < 0:
        raise DataError(f"--seed {seed}: cannot be negative")
    if speech:
        require_speech()
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
            one = partial(_sample, draw, seed, stream, held_out, size, max_objects, speech)
            # Starting a process takes longer than making a few samples.
            samples = pool.map(one, range(count), chunksize=_CHUNK) if count > _CHUNK else map(one, range(count))
            with ShardWriter(unfinished / name, "eval" if held_out else "train", SAMPLES_PER_SHARD) as writer:
                bar = tqdm(samples, name, count, unit="sample", disable=None, leave=False)
                for i, (media, recording, meta) in enumerate(bar):
                    key = f"{name}-{i:07d}"
                    has = ("video" if media_type == "mp4" else "image", *(("speech",) if speech else ()))
                    tasks = [spec.name for spec in TASKS if spec.qualifies(has, meta["captions"], meta)]
                    meta |= {"id": key, "source": "synthetic", "tasks": tasks}
                    text = meta["captions"][0]
                    writer.write(key, media, media_type, text, meta, recording=recording, recording_type="flac")
    finally:
        pool.shutdown(cancel_futures=True)
    for folder in unfinished.iterdir():
        folder.rename(output / folder.name)
    unfinished.rmdir()


def _sample(
    draw: Draw, seed: int, stream: int, held_out: bool, size: int, max_objects: int, speech: bool, i: int
) -> tuple[bytes, bytes | None, dict[str, Any]]:
    """Media, recording and KEY.json values of a sample."""
    rng = np.random.default_rng([seed, stream, i])
    media, meta = draw(rng, held_out, size, max_objects)
    if not speech:
        return media, None, meta
    voice, words = Voice.choose(rng, held_out), meta["captions"][0]
    recording, seconds = spoken(words, voice)
    return media, recording, {**meta, "transcript": words, "speech_seconds": seconds, "voice": str(voice)}


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
    parser.add_argument("--speech", action="store_true", help="speak the first caption of every sample by espeak-ng")
    given = parser.parse_args(arguments)

    def command() -> int:
        generate(**vars(given))
        print(f"wrote {given.images} + {given.eval_images} images and {given.videos} + {given.eval_videos} videos "
              f"(training + held-out) to {given.output}")  # fmt: skip
        return 0

    return run(command)
