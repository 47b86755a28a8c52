"""Encoded bytes -> pixels -> patches.

Pixels are RGB, uint8 [h, w, 3]. Shapes: p patches, C = 3 * patch_size**2 bytes per patch, ordered (channel, y, x).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.image_metadata import has_no_metadata, is_on_its_side, orientation, upright, without_metadata
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.video_file import open_video
from dsmoe_vl.errors import DataError

MAX_PIXELS = 100_000_000  # of an image or frame; a larger one is refused as a decompression bomb

_FORMATS = ("JPEG", "PNG", "WEBP")


class ReadImage(NamedTuple):
    """A decoded image: `pixels` [h, w, 3], upright, perhaps reduced; and of the file its upright size in pixels, and
    whether metadata were ignored because they are damaged."""

    pixels: np.ndarray
    width: int
    height: int
    damaged_metadata: bool


def decode_image(data: bytes, enough_pixels: int = 0) -> np.ndarray:
    """Decode an image, turned upright, transparent parts in white: pixels [h, w, 3].

    With `enough_pixels`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its sides, but never to fewer pixels than that.
    Raises DataError if `data` is not a JPEG, PNG or WebP, is truncated, or has more than MAX_PIXELS. Damaged metadata
    are ignored.
    """
    return read_image(data, enough_pixels).pixels


def read_image(data: bytes, enough_pixels: int = 0) -> ReadImage:
    """As `decode_image`, with what else is known of the file."""
    try:
        return _read_image(data, enough_pixels)
    except DataError:
        raise
    except Exception as error:  # decoders raise anything for malformed bytes
        for bare in without_metadata(data):
            with contextlib.suppress(Exception):
                return _read_image(bare, enough_pixels)._replace(damaged_metadata=True)
        if isinstance(error, UnidentifiedImageError):  # its message is the address of a buffer
            raise DataError("image cannot be decoded: not a JPEG, PNG or WebP") from None
        raise DataError(f"image cannot be decoded: {error}") from error


def check_pixels(width: int, height: int) -> None:
    """Raise DataError if an image has more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise DataError(f"image too large: {width} x {height} pixels, at most {MAX_PIXELS} are decoded")


def decode_video(
    data: bytes, frames: int, sampling: str = "uniform", per_second: float = 1.0
) -> list[tuple[float, np.ndarray]]:
    """Decode up to `frames` frames, upright and with square pixels: seconds since the first frame, pixels [h, w, 3].

    A frame that cannot be decoded is replaced by the next one that can.

    Args:
        sampling: "uniform": the middle frames of equal parts of the video.
            "fps": the same with `per_second` parts per second, at most `frames`.
            "keyframes": keyframes only, evenly chosen; nothing else is decoded.
            "first": the first frame.

    Raises DataError if `data` is not a video, was cut short, has no frame that can be decoded, or has frames of more
    than MAX_PIXELS.
    """
    return list(iterate_video(data, frames, sampling, per_second))


def iterate_video(
    data: bytes, frames: int, sampling: str = "uniform", per_second: float = 1.0
) -> Iterator[tuple[float, np.ndarray]]:
    """As `decode_video`, one frame at a time, for videos whose frames would fill the memory."""
    with open_video(data, MAX_PIXELS) as video:
        yield from video.frames(frames, sampling, per_second)


def sampled_frames(sample: Sample, data: DataConfig) -> Iterator[tuple[float, np.ndarray]]:
    """The frames of a sample's video that the model sees under a recipe, as `iterate_video`. Raises DataError."""
    if sample.media is None:
        raise DataError("no image or video")
    return iterate_video(sample.media, data.video_frames, data.video_sampling, data.video_fps)


def pictures_of(sample: Sample, frames: int, enough_pixels: int = 0) -> list[np.ndarray]:
    """What a sample shows: its image, with `enough_pixels` as in `decode_image`, or at most `frames` evenly spaced
    frames of its video. Pixels [h, w, 3] each. Raises DataError."""
    if sample.media is None:
        raise DataError("no image or video")
    if sample.is_video:
        return [pixels for _, pixels in decode_video(sample.media, frames)]
    return [decode_image(sample.media, enough_pixels)]


def fit_grid(width: int, height: int, patch_size: int, merge: int, max_patches: int) -> tuple[int, int]:
    """Patch (rows, columns) for a picture of `width` x `height` pixels.

    Both are multiples of `merge`, their product is at most `max_patches`, and the grid is not larger than the picture.
    The aspect ratio is kept as nearly as whole cells allow.
    """
    cell = patch_size * merge
    budget = max_patches // merge**2
    assert budget >= 1, f"max_patches {max_patches} is less than one cell of {merge} x {merge}"
    shrink = min(1.0, math.sqrt(budget * cell**2 / (width * height)))
    rows = max(1, round(height * shrink / cell))
    columns = max(1, round(width * shrink / cell))
    if rows * columns > budget:  # rounded up: reduce the side that changes the aspect ratio less
        cuts = [(budget // columns, columns), (rows, budget // rows)]
        rows, columns = min(
            (cut for cut in cuts if min(cut) >= 1),
            key=lambda cut: abs(math.log(cut[1] * height / (cut[0] * width))),
        )
    return rows * merge, columns * merge


def to_patches(pixels: np.ndarray, grid: tuple[int, int], patch_size: int, merge: int) -> np.ndarray:
    """Resize pixels [h, w, 3] to `grid` (patch rows, columns) and cut them into patches: uint8 [p, C].

    Cells of merge x merge patches are ordered row by row, and so are the patches in a cell.
    """
    rows, columns = grid
    pixels = resized(pixels, rows * patch_size, columns * patch_size)
    parts = pixels.reshape(rows // merge, merge, patch_size, columns // merge, merge, patch_size, 3)
    cells = parts.transpose(0, 3, 1, 4, 6, 2, 5)  # cell row, cell column, patch row, patch column, channel, y, x
    return cells.reshape(rows * columns, 3 * patch_size**2)


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing: [h, w, 3] -> [height, width, 3].

    PyTorch is four times as fast as Pillow here; results differ by rounding (benchmarks/data.py prints how much).
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch  # takes seconds, and the data tools only decode

    with torch.inference_mode():
        planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1).unsqueeze(0)
        planes = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
        return planes[0].permute(1, 2, 0).numpy()


def _read_image(data: bytes, enough_pixels: int) -> ReadImage:
    if has_no_metadata(data) and (plain := _plain_jpeg(data, enough_pixels)) is not None:
        return plain
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    check_pixels(width, height)
    least = _least(width, height, enough_pixels)
    pixels = _jpeg_pixels(data, least) if image.format == "JPEG" and image.mode in ("RGB", "L") else None
    if pixels is None:
        if enough_pixels:
            image.draft(None, least)
        image.load()
        pixels = np.asarray(to_rgb(image))
    turned, is_damaged = orientation(image)
    size = (height, width) if is_on_its_side(turned) else (width, height)
    return ReadImage(upright(pixels, turned), *size, is_damaged)


def _plain_jpeg(data: bytes, enough_pixels: int) -> ReadImage | None:
    """A JPEG of the usual colours without metadata, which needs no look by Pillow; None for any other."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "Gray"):
        return None
    check_pixels(width, height)
    pixels = _jpeg_pixels(data, _least(width, height, enough_pixels))
    return None if pixels is None else ReadImage(pixels, width, height, damaged_metadata=False)


def _least(width: int, height: int, enough_pixels: int) -> tuple[int, int]:
    """The least width and height that a reduced JPEG must have; (0, 0): it is not reduced."""
    if not 0 < enough_pixels < width * height:
        return 0, 0
    shrink = math.sqrt(enough_pixels / (width * height))
    return math.ceil(width * shrink), math.ceil(height * shrink)


def _jpeg_pixels(data: bytes, least: tuple[int, int]) -> np.ndarray | None:
    """A JPEG as Pillow decodes it, but faster, at least `least` pixels wide and high; None if libjpeg warns."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_width=least[0], min_height=least[1])
    except ValueError:
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits per channel, transparent parts in white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits per pixel: convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")
