"""How fast data come: the loader beside a plain webdataset pipeline, the converter beside a TarWriter loop, resuming.

    python benchmarks/data.py [--photos DIR] [--samples 600] [--workers 2] [--repeats 10] [--json FILE]

What is compared does the same work and takes turns. Photos are JPEGs of 640 x 480 with the statistics of natural ones,
drawn here, or those of a folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from data_converter import time_converter
from PIL import Image
from record import Result
from turns import Interleaved

from data_tools.convert import convert
from data_tools.formats import Record
from data_tools.parts import Settings

WORDS = ("a", "photo", "of", "two", "dogs", "that", "run", "along", "the", "beach", "while", "children", "play", "with")


def make_photos(folder: Path, count: int) -> Path:
    """JPEGs whose spectrum falls as that of photos, about 90 KB each."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(480)[:, None], np.fft.rfftfreq(640)[None, :])
    for number in range(count):
        noise = np.fft.rfft2(rng.normal(size=(3, 480, 640))) / np.maximum(frequency, 1 / 640) ** 1.3
        field = np.fft.irfft2(noise, (480, 640))
        pixels = 128 + 50 * field / field.std(axis=(1, 2), keepdims=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(
            folder / f"{number:05}.jpg", quality=92
        )
    return folder


def records(folder: Path, count: int) -> list[Record]:
    """`count` records of the photos of a folder, again from the first where there are fewer."""
    photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(6, 18)))) for _ in range(count)]
    return [Record(f"{i:07}", "image", photos[i % len(photos)], [text]) for i, text in enumerate(texts)]


def main() -> int:
    """Make the data, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of JPEGs instead of those that are drawn")
    parser.add_argument("--samples", type=int, default=600, help="a turn")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10, help="turns that count")
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    args = parser.parse_args()
    # Not above: with PyTorch, which the converter's processes, which read this file anew, do not need.
    from data_loader import MAX_PATCHES, time_loader, time_resume

    from data_tools.tokenizer.train import train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        photos = args.photos or make_photos(folder / "photos", min(200, args.samples))
        found = records(photos, 2 * args.samples)
        convert(found, folder / "shards", Settings("photos", samples_per_shard=100), workers=args.workers)
        train([folder / "shards"], folder / "tokenizer.model", vocab_size=400)
        run = Interleaved(args.repeats)
        figures: dict[str, Any] = {
            "photos": len({record.media for record in found}), "patches": MAX_PATCHES, "workers": args.workers,
            "samples": args.samples, "repeats": args.repeats,
        }  # fmt: skip
        figures |= time_loader(folder / "shards", folder / "tokenizer.model", args.workers, run, args.samples)
        figures |= time_converter(records(photos, 10 * args.samples), args.workers, run)
        figures |= time_resume(folder, args.repeats)
    if args.json:
        Result.now("data", {**figures, "rates": run.figures}).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
