"""Encoded bytes -> pixels -> patches.

Shapes: p patches, C = 3 * patch_size**2 bytes a patch, ordered (channel, y, x).
"""

from __future__ import annotations

import io
import math
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from dsmoe_vl.errors import DataError

MAX_PIXELS = 100_000_000  # of one image or frame; more is refused as a decompression bomb

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, enough_pixels: int = 0) -> Image.Image:
    """The picture in `data` as upright RGB; transparency becomes white.

    With `enough_pixels`, a larger JPEG may be decoded at 1/2, 1/4 or 1/8 of its sides, never to fewer pixels than that.
    Raises DataError where `data` is no JPEG, PNG or WebP, is cut, or holds more than MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"image too large: {width} x {height} pixels, at most {MAX_PIXELS} are decoded")
        if 0 < enough_pixels < width * height:
            shrink = math.sqrt(enough_pixels / (width * height))
            image.draft(None, (math.ceil(width * shrink), math.ceil(height * shrink)))
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
        image = _to_rgb(image)
        return image.transpose(turn) if turn is not None else image
    except DataError:
        raise
    except Exception as error:  # whatever a decoder throws at malformed bytes
        raise DataError(f"image cannot be decoded: {error}") from error


def decode_video(data: bytes, frames: int) -> list[tuple[float, Image.Image]]:
    """At most `frames` upright RGB frames, uniform in time, each with its seconds since the first frame.

    Every frame stands for an equal part of the video and is taken from the middle of it. Raises DataError where `data`
    holds no video, is damaged, or has frames of more than MAX_PIXELS.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                raise DataError("video cannot be decoded: no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > MAX_PIXELS:
                raise DataError(f"video too large: {pixels} pixels a frame, at most {MAX_PIXELS} are decoded")
            packets = [packet for packet in container.demux(stream) if packet.size]
            ticks = sorted({_ticks(packet) for packet in packets})
            if not ticks:
                raise DataError("video cannot be decoded: no frames")
            chosen = _decode_at(stream, packets, _uniform(ticks, frames))
            if not chosen:
                raise DataError("video cannot be decoded: no frames")
            second = stream.time_base or Fraction(1)
            converter = VideoReformatter()  # one for all: setting it up costs more than converting a small frame
            return [(float((_ticks(frame) - ticks[0]) * second), _upright_frame(frame, converter)) for frame in chosen]
    except DataError:
        raise
    except Exception as error:  # whatever FFmpeg throws at malformed bytes
        raise DataError(f"video cannot be decoded: {error}") from error


def fit_grid(width: int, height: int, patch_size: int, merge: int, max_patches: int) -> tuple[int, int]:
    """Patch (rows, columns) for a picture of `width` x `height` pixels: both multiples of `merge`, product at most
    `max_patches`, the aspect ratio kept as nearly as whole cells allow, never larger than the picture itself.
    """
    cell = patch_size * merge
    budget = max_patches // merge**2
    assert budget >= 1, f"max_patches {max_patches} is less than one cell of {merge} x {merge}"
    shrink = min(1.0, math.sqrt(budget * cell**2 / (width * height)))
    rows = max(1, round(height * shrink / cell))
    columns = max(1, round(width * shrink / cell))
    if rows * columns > budget:  # rounding went up: cut the side that hurts the aspect ratio less
        cuts = [(budget // columns, columns), (rows, budget // rows)]
        rows, columns = min(
            (cut for cut in cuts if min(cut) >= 1),
            key=lambda cut: abs(math.log(cut[1] * height / (cut[0] * width))),
        )
    return rows * merge, columns * merge


def to_patches(image: Image.Image, grid: tuple[int, int], patch_size: int, merge: int) -> np.ndarray:
    """Resize an RGB image to `grid` (patch rows, columns) and cut it up: uint8 [p, C].

    Cells of merge x merge patches run row by row, and so do the patches inside a cell.
    """
    rows, columns = grid
    size = (columns * patch_size, rows * patch_size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = np.asarray(image).reshape(rows // merge, merge, patch_size, columns // merge, merge, patch_size, 3)
    cells = pixels.transpose(0, 3, 1, 4, 6, 2, 5)  # cell row, cell column, patch row, patch column, channel, y, x
    return cells.reshape(rows * columns, 3 * patch_size**2)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _ticks(timed: av.Packet | av.VideoFrame) -> int:
    """Presentation time in the stream's time base; AVI knows decoding times only."""
    ticks = timed.pts if timed.pts is not None else timed.dts
    if ticks is None:
        raise DataError("video cannot be decoded: frames without a time")
    return ticks


def _uniform(ticks: list[int], frames: int) -> list[int]:
    """For the middle of each of `frames` equal parts of the time span, the last of the sorted `ticks` not after it."""
    if len(ticks) <= frames:
        return ticks
    duration = (ticks[-1] - ticks[0]) * len(ticks) / (len(ticks) - 1)  # the last frame is shown as long as the others
    middles = ticks[0] + (np.arange(frames) + 0.5) * duration / frames
    return [ticks[i] for i in np.unique(np.searchsorted(ticks, middles, side="right") - 1)]


def _decode_at(stream: av.VideoStream, packets: list[av.Packet], targets: list[int]) -> list[av.VideoFrame]:
    """For each of the sorted `targets` the first frame that is not before it, without decoding the groups of pictures
    between targets.
    """
    decoder = stream.codec_context
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe] or [0]
    chosen: list[av.VideoFrame] = []
    fed = 0  # packets given to the decoder or skipped
    waiting: list[av.VideoFrame] = []  # decoded, later than the last target
    for target in targets:
        key = max((i for i in keyframes if _ticks(packets[i]) <= target), default=0)
        if key > fed:
            decoder.flush_buffers()
            fed, waiting = key, []
        while True:
            waiting = [frame for frame in waiting if _ticks(frame) >= target]
            if waiting or fed > len(packets):
                break
            # One past the last packet, None drains the frames that the decoder still holds.
            waiting = list(decoder.decode(packets[fed] if fed < len(packets) else None))
            fed += 1
        if waiting and (not chosen or waiting[0] is not chosen[-1]):
            chosen.append(waiting[0])
    return chosen


def _upright_frame(frame: av.VideoFrame, converter: VideoReformatter) -> Image.Image:
    image = Image.fromarray(converter.reformat(frame, format="rgb24").to_ndarray())
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
