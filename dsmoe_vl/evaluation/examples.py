"""Examples for a report, chosen while an evaluation runs.

The choice is by a seeded hash of the sample's name. It does not depend on the order or the number of ranks, and two
runs on the same shards show the same pictures.
"""

from __future__ import annotations

import hashlib
import io
from bisect import insort
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from dsmoe_vl.data.decode import pictures_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.report.content import Thumbnail

SMALL_SIDE = 96  # pixels of a video frame's longer side
_SIDE = 192  # pixels of an image's longer side: sharp on a phone's screen
_QUALITY = 80

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """Maximum examples per folder: captions, additional wrong ones, queries per direction, videos."""

    captions: int = 8
    wrong: int = 4
    queries: int = 4
    videos: int = 3

    @staticmethod
    def of(folders: int) -> Counts:
        """Fewer per folder if there are many folders, so that the page stays small."""
        return Counts(*(max(1, min(most, most * 6 // max(folders, 1))) for most in astuple(Counts())))


class Chosen(Generic[T]):
    """Keeps at most `count` of the offered values."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self.entries: list[tuple[int, str, T]] = []  # (hash, name, value) of the smallest hashes so far

    def offer(self, name: str, make: Callable[[], T]) -> None:
        """Keep the value of `make()` if `name` is among the chosen so far. Skipped if it raises DataError."""
        priority = example_priority(self._seed, name)
        if len(self.entries) == self._count and (not self._count or priority >= self.entries[-1][0]):
            return
        try:
            self._insert((priority, name, make()))
        except DataError:
            return

    def merged(self, dealer: Dealer) -> list[T]:
        """The chosen values of all ranks, sorted by name. Collective."""
        everywhere = sorted(
            (entry for entries in dealer.gather(self.entries) for entry in entries), key=lambda entry: entry[:2]
        )
        return [value for _, _, value in sorted(everywhere[: self._count], key=lambda entry: entry[1])]

    def _insert(self, entry: tuple[int, str, T]) -> None:
        insort(self.entries, entry, key=lambda kept: kept[0])
        del self.entries[self._count :]


def thumbnails(sample: Sample, frames: int) -> list[Thumbnail]:
    """The image, or `frames` frames of the video. Raises DataError."""
    side = SMALL_SIDE if sample.is_video else _SIDE
    return [thumbnail(pixels, side) for pixels in pictures_of(sample, frames, enough_pixels=4 * _SIDE**2)]


def thumbnail(pixels: np.ndarray, side: int) -> Thumbnail:
    """JPEG of pixels [h, w, 3], scaled down if the longer side is above `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return Thumbnail(file.getvalue(), image.width, image.height)


def example_priority(seed: int, name: str) -> int:
    """The sort key of a sample's name; the smallest are chosen."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
