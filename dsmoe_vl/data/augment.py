"""Augmentation of training pictures: another view, other colours, an erased part. Off unless [data.augment] is set.

What is done to a sample is a function of the run's seed, the sample and the epoch alone, so a resumed run repeats it.
It is given in shares of a picture's sides, so every frame of a video is treated alike.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dsmoe_vl.config.recipe import AugmentConfig
from dsmoe_vl.data.decode import resized

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's grey
_MIDDLE = 127.5  # contrast changes around it: white and black stay apart, and every frame has the same map
_ERASED_AREA = (0.02, 0.2)  # share of the picture; Zhong et al. 2020 erase up to 0.4, which hides whole objects
_ERASED_RATIO = 0.3  # smallest ratio of its sides; the largest is 1 / 0.3 (Zhong et al. 2020)


@dataclass(frozen=True)
class Augmentation:
    """What is done to the pictures of one sample in one epoch; by default nothing."""

    centre: tuple[float, float] = (0.5, 0.5)  # of the view, row and column, in shares of the picture's sides
    scale: tuple[float, float] = (1.0, 1.0)  # height and width of the view, in shares of the picture's sides
    radians: float = 0.0  # by which the view is turned
    mirrored: bool = False
    colour: tuple[float, ...] = ()  # RGB to RGB, affine: a row-major matrix of 3 x 4; (): as it is
    erased: tuple[float, ...] = ()  # left, top, right, bottom in shares of the view's sides; (): nothing

    @classmethod
    def choose(cls, config: AugmentConfig, seed: int, source: str, key: str, epoch: int) -> Augmentation:
        """The choice for a sample in an epoch. `seed`: of the run; `source`: the name of the sample's source."""
        names = (zlib.crc32(name.encode("utf-8", "surrogatepass")) for name in (source, key))
        rng = np.random.default_rng((seed, *names, epoch))
        # All numbers are always drawn, so that a change of one setting does not change what the others do.
        size, ratio, row, column, turn, *colours = rng.uniform(-1.0, 1.0, 8)
        mirror, erase, *rectangle = rng.random(6)
        factor = (1 + config.zoom) ** size
        # Width over height changes by at most the square root of the zoom: 8/7 for 0.3. A square remains a square.
        stretch = (1 + config.zoom) ** (ratio / 4)
        return cls(
            centre=(0.5 + config.shift * row, 0.5 + config.shift * column),
            scale=(factor / stretch, factor * stretch),
            radians=math.radians(config.rotate * turn),
            mirrored=bool(mirror < config.mirror),
            colour=_colour(*(1 + config.colour * change for change in colours)) if config.colour else (),
            erased=_rectangle(*rectangle) if erase < config.erase else (),
        )

    def apply(self, pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        """The augmented picture at the given size: uint8 [h, w, 3] -> [height, width, 3], perhaps read-only.

        Without augmentation it equals `resized`. Beyond its edge a picture continues with the colours of the edge.
        """
        cos, sin = abs(math.cos(self.radians)), abs(math.sin(self.radians))
        # The upright box around the turned view: it costs no second resampling unless the view is turned.
        tall, wide = math.ceil(height * cos + width * sin), math.ceil(width * cos + height * sin)
        pixels = self._view(pixels, (tall, wide), (tall / height, wide / width))
        if not (self.radians or self.mirrored or self.colour or self.erased):
            return pixels
        image = _image(pixels)
        if self.radians:
            image = _turned(image, self.radians, height, width)
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.colour:
            image = image.convert("RGB", self.colour)
        if self.erased:
            left, top, right, bottom = self.erased
            box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
            mean = image.resize((1, 1), Image.Resampling.BOX)
            image.paste(tuple(mean.tobytes()), box)
        return np.asarray(image)

    def _view(self, pixels: np.ndarray, size: tuple[int, int], larger: tuple[float, float]) -> np.ndarray:
        """What the view shows, `larger` times as high and wide, resized to `size`: [h, w, 3] -> [*size, 3]."""
        spans = [
            _Span.of(centre, scale * more, length, target)
            for centre, scale, more, length, target in zip(
                self.centre, self.scale, larger, pixels.shape[:2], size, strict=True
            )
        ]
        rows, columns = spans
        inside = resized(pixels[rows.first : rows.end, columns.first : columns.end], rows.size, columns.size)
        margins = [(span.before, span.after) for span in spans]
        return np.pad(inside, (*margins, (0, 0)), mode="edge") if any(map(any, margins)) else inside


@dataclass(frozen=True)
class _Span:
    """One axis of a view: pixels `first` to `end` of the picture become `size` pixels, between two margins."""

    first: int
    end: int
    before: int
    size: int
    after: int

    @classmethod
    def of(cls, centre: float, share: float, length: int, target: int) -> _Span:
        """The span of `share` of a side of `length` pixels around `centre` (a share too), shown in `target` pixels."""
        start, stop = (centre - share / 2) * length, (centre + share / 2) * length
        low, high = max(start, 0.0), min(stop, float(length))
        shown = [round((edge - start) / (stop - start) * target) for edge in (low, high)]
        first, before = min(round(low), length - 1), min(shown[0], target - 1)
        size = max(shown[1] - before, 1)
        return cls(first, max(round(high), first + 1), before, size, target - before - size)


def _image(pixels: np.ndarray) -> Image.Image:
    """Pixels [h, w, 3] as an image, a copy."""
    if pixels.flags.c_contiguous:
        return Image.fromarray(pixels)
    # Resizing leaves one plane per channel; one at a time they are copied fifteen times as fast.
    return Image.merge("RGB", [Image.fromarray(plane) for plane in np.moveaxis(pixels, -1, 0)])


def _turned(image: Image.Image, radians: float, height: int, width: int) -> Image.Image:
    """The middle of an image, turned around its centre: bilinear, `height` x `width` pixels."""
    cos, sin = math.cos(radians), math.sin(radians)
    x = (image.width - cos * width - sin * height) / 2
    y = (image.height + sin * width - cos * height) / 2
    into = (cos, sin, x, -sin, cos, y)  # a place in the result to one in `image`
    return image.transform((width, height), Image.Transform.AFFINE, into, Image.Resampling.BILINEAR)


def _colour(brightness: float, contrast: float, saturation: float) -> tuple[float, ...]:
    """The map b (c (s x + (1 - s) grey(x) - middle) + middle). The order of the channels, so the hue, is kept."""
    gain = brightness * contrast
    offset = brightness * (1 - contrast) * _MIDDLE
    grey = [gain * (1 - saturation) * weight for weight in _LUMA]
    rows = [[*(grey[j] + gain * saturation * (i == j) for j in range(3)), offset] for i in range(3)]
    return tuple(value for row in rows for value in row)


def _rectangle(area: float, ratio: float, left: float, top: float) -> tuple[float, ...]:
    """Left, top, right, bottom in shares of the sides, from four numbers in [0, 1)."""
    least, most = _ERASED_AREA
    share = least + (most - least) * area
    stretch = _ERASED_RATIO ** (2 * ratio - 1)
    width, height = math.sqrt(share * stretch), math.sqrt(share / stretch)  # both below 1
    left, top = left * (1 - width), top * (1 - height)
    return left, top, left + width, top + height
