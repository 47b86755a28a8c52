"""Examples for a report, chosen while an evaluation runs.

The choice is by a seeded hash of a sample's name: neither the order nor the number of ranks changes it, and two runs on
the same shards show the same pictures.
"""

from __future__ import annotations

import hashlib
import io
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from dsmoe_vl.data.decode import pictures_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.report.content import Thumbnail

SMALL_SIDE = 96  # pixels of the longer side of what is shown many times
_SIDE = 192  # pixels of a thumbnail's longer side: enough for a card on a phone's dense screen
_QUALITY = 80

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """Examples of one folder at most: captions, more of wrong ones, queries in each direction, videos."""

    captions: int = 8
    wrong: int = 4
    queries: int = 4
    videos: int = 3

    @staticmethod
    def of(folders: int) -> Counts:
        """Fewer of each where there are many folders, so that the page stays small."""
        return Counts(*(max(1, min(most, most * 6 // max(folders, 1))) for most in (8, 4, 4, 3)))


class Chosen(Generic[T]):
    """At most `count` of the values that are offered."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self.entries: list[tuple[int, str, T]] = []  # the smallest hashes so far, in order, with the names

    def offer(self, name: str, make: Callable[[], T]) -> None:
        """Keep what `make` returns, if `name` is among the chosen so far. What raises DataError is passed over."""
        priority = example_priority(self._seed, name)
        if len(self.entries) == self._count and (not self._count or priority >= self.entries[-1][0]):
            return
        try:
            self._insert((priority, name, make()))
        except DataError:
            return

    def merged(self, dealer: Dealer) -> list[T]:
        """The chosen of all ranks, in the order of their names. Collective."""
        everywhere = sorted(
            (entry for entries in dealer.gather(self.entries) for entry in entries), key=lambda entry: entry[:2]
        )
        return [value for _, _, value in sorted(everywhere[: self._count], key=lambda entry: entry[1])]

    def _insert(self, entry: tuple[int, str, T]) -> None:
        insort(self.entries, entry, key=lambda kept: kept[0])
        del self.entries[self._count :]


def thumbnails(sample: Sample, frames: int) -> list[Thumbnail]:
    """The image, or so many frames of the video. Raises DataError."""
    side = SMALL_SIDE if sample.is_video else _SIDE
    return [thumbnail(pixels, side) for pixels in pictures_of(sample, frames, enough_pixels=4 * _SIDE**2)]


def thumbnail(pixels: np.ndarray, side: int) -> Thumbnail:
    """Pixels [h, w, 3], made smaller where the longer side is above `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return Thumbnail(file.getvalue(), image.width, image.height)


def example_priority(seed: int, name: str) -> int:
    """The smaller, the sooner a sample of that name is chosen."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
