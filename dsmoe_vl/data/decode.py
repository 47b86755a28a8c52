"""Encoded bytes -> pixels -> patches.

Pixels are RGB, uint8 [h, w, 3]. Shapes: p patches, C = 3 * patch_size**2 bytes per patch, ordered (channel, y, x).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import av
import numpy as np
import simplejpeg
from av.video.reformatter import VideoReformatter
from PIL import Image, UnidentifiedImageError

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError

MAX_PIXELS = 100_000_000  # of an image or frame; a larger one is refused as a decompression bomb

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION_TAG = 0x0112
# How to turn a picture upright, by its EXIF orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}


def decode_image(data: bytes, enough_pixels: int = 0) -> np.ndarray:
    """Decode an image, turned upright, transparent parts in white: pixels [h, w, 3].

    With `enough_pixels`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its sides, but never to fewer pixels than that.
    Raises DataError if `data` is not a JPEG, PNG or WebP, is truncated, or has more than MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"image too large: {width} x {height} pixels, at most {MAX_PIXELS} are decoded")
        least = (0, 0)
        if 0 < enough_pixels < width * height:
            shrink = math.sqrt(enough_pixels / (width * height))
            least = math.ceil(width * shrink), math.ceil(height * shrink)
        pixels = _jpeg_pixels(data, least) if image.format == "JPEG" and image.mode in ("RGB", "L") else None
        if pixels is None:
            if enough_pixels:
                image.draft(None, least)
            image.load()
            pixels = np.asarray(_to_rgb(image))
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        return _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels
    except DataError:
        raise
    except UnidentifiedImageError:  # its message is the address of a buffer
        raise DataError("image cannot be decoded: not a JPEG, PNG or WebP") from None
    except Exception as error:  # decoders raise anything for malformed bytes
        raise DataError(f"image cannot be decoded: {error}") from error


def decode_video(
    data: bytes, frames: int, sampling: str = "uniform", per_second: float = 1.0
) -> list[tuple[float, np.ndarray]]:
    """Decode up to `frames` frames, turned upright: seconds since the first frame, and pixels [h, w, 3].

    Args:
        sampling: "uniform": the middle frames of equal parts of the video.
            "fps": the same with `per_second` parts per second, at most `frames`.
            "keyframes": keyframes only, evenly chosen; nothing else is decoded.
            "first": the first frame.

    Raises DataError if `data` is not a video, is damaged, or has frames of more than MAX_PIXELS.
    """
    return list(iterate_video(data, frames, sampling, per_second))


def iterate_video(
    data: bytes, frames: int, sampling: str = "uniform", per_second: float = 1.0
) -> Iterator[tuple[float, np.ndarray]]:
    """As `decode_video`, one frame at a time, for videos whose frames would fill the memory."""
    try:
        with av.open(io.BytesIO(data), "r", format=_container(data)) as container:
            if not container.streams.video:
                raise DataError("video cannot be decoded: no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > MAX_PIXELS:
                raise DataError(f"video too large: {pixels} pixels per frame, at most {MAX_PIXELS} are decoded")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # a later frame may be larger
            packets, left = [], 4 * len(data)
            for packet in container.demux(stream):
                left -= packet.size
                if left < 0:  # an index that repeats the same bytes would fill the memory
                    raise DataError("video cannot be decoded: its frames are larger than the file")
                if packet.size:
                    packets.append(packet)
            ticks = sorted({_ticks(packet) for packet in packets})
            if not ticks:
                raise DataError("video cannot be decoded: no frames")
            second = stream.time_base or Fraction(1)
            if sampling == "keyframes":
                keys = sorted({_ticks(packet) for packet in packets if packet.is_keyframe}) or ticks[:1]
                targets = [keys[i] for i in np.unique((np.arange(frames) + 0.5) * len(keys) // frames).astype(int)]
            elif sampling == "first":
                targets = ticks[:1]
            else:
                if sampling == "fps":
                    frames = min(frames, max(1, round(_duration(ticks) * second * per_second)))
                targets = _uniform(ticks, frames)
            converter = VideoReformatter()  # creating one costs more than converting a small frame
            found = False
            for frame in _decode_at(stream, packets, targets):
                found = True
                yield float((_ticks(frame) - ticks[0]) * second), _upright_frame(frame, converter)
            if not found:
                raise DataError("video cannot be decoded: no frames")
    except DataError:
        raise
    except Exception as error:  # FFmpeg raises anything for malformed bytes
        raise DataError(f"video cannot be decoded: {error}") from error


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


def _jpeg_pixels(data: bytes, least: tuple[int, int]) -> np.ndarray | None:
    """A JPEG as Pillow decodes it, but faster, at least `least` pixels wide and high; None if libjpeg warns."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_width=least[0], min_height=least[1])
    except ValueError:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits per pixel: convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _container(data: bytes) -> str:
    """FFmpeg's name of the container. FFmpeg must not guess: it would open a playlist, which can name local files."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise DataError("video cannot be decoded: neither MP4, WebM, Matroska nor AVI")


def _ticks(timed: av.Packet | av.VideoFrame) -> int:
    """Presentation time in the stream's time base; in AVI, which has none, the decoding time."""
    ticks = timed.pts if timed.pts is not None else timed.dts
    if ticks is None:
        raise DataError("video cannot be decoded: frames without a time")
    return ticks


def _uniform(ticks: list[int], frames: int) -> list[int]:
    """The frame shown in the middle of each of `frames` equal parts of the video; `ticks` are sorted."""
    if len(ticks) <= frames:
        return ticks
    middles = ticks[0] + (np.arange(frames) + 0.5) * float(_duration(ticks)) / frames
    return [ticks[i] for i in np.unique(np.searchsorted(ticks, middles, side="right") - 1)]


def _duration(ticks: list[int]) -> Fraction:
    """In ticks. The last frame is assumed to be shown for the mean time of the others."""
    return Fraction((ticks[-1] - ticks[0]) * len(ticks), max(1, len(ticks) - 1))


def _decode_at(stream: av.VideoStream, packets: list[av.Packet], targets: list[int]) -> Iterator[av.VideoFrame]:
    """For each of the sorted `targets` the first frame at or after it. Skips groups of pictures between targets."""
    decoder = stream.codec_context
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe] or [0]
    last: av.VideoFrame | None = None
    fed = 0  # packets given to the decoder or skipped
    waiting: list[av.VideoFrame] = []  # decoded, after the last target
    for target in targets:
        key = max((i for i in keyframes if _ticks(packets[i]) <= target), default=0)
        if key > fed:
            decoder.flush_buffers()
            fed, waiting = key, []
        while True:
            waiting = [frame for frame in waiting if _ticks(frame) >= target]
            if waiting or fed > len(packets):
                break
            # After the last packet, None returns the frames that are left in the decoder.
            waiting = list(decoder.decode(packets[fed] if fed < len(packets) else None))
            fed += 1
        if waiting and waiting[0] is not last:
            last = waiting[0]
            yield last


def _upright_frame(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    # By default every converter starts one thread per core.
    pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels
