"""Encoded bytes -> pixels -> patches.

Pixels are RGB, uint8 [h, w, 3]. Shapes: p patches, C = 3 * patch_size**2 bytes a patch, ordered (channel, y, x).
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

MAX_PIXELS = 100_000_000  # of one image or frame; more is refused as a decompression bomb

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION_TAG = 0x0112
# What makes a picture upright, by its orientation.
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
    """The picture in `data`, upright: pixels [h, w, 3]; transparency becomes white.

    With `enough_pixels`, a larger JPEG may be decoded at 1/2, 1/4 or 1/8 of its sides, never to fewer pixels than that.
    Raises DataError where `data` is no JPEG, PNG or WebP, is cut, or holds more than MAX_PIXELS.
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
    except UnidentifiedImageError:  # whose own message is the address of a buffer
        raise DataError("image cannot be decoded: it is no JPEG, PNG or WebP") from None
    except Exception as error:  # whatever a decoder throws at malformed bytes
        raise DataError(f"image cannot be decoded: {error}") from error


def decode_video(
    data: bytes, frames: int, sampling: str = "uniform", per_second: float = 1.0
) -> list[tuple[float, np.ndarray]]:
    """At most `frames` upright frames: seconds since the first frame, and pixels [h, w, 3].

    Args:
        sampling: "uniform": every frame stands for an equal part of the video and is taken from the middle of it.
            "fps": the same, with `per_second` parts a second as long as `frames` are enough for the whole. "keyframes":
            of the frames that are coded for themselves, as evenly as may be; nothing else is decoded. "first": the
            first frame alone.

    Raises DataError where `data` holds no video, is damaged, or has frames of more than MAX_PIXELS.
    """
    return list(iterate_video(data, frames, sampling, per_second))


def iterate_video(
    data: bytes, frames: int, sampling: str = "uniform", per_second: float = 1.0
) -> Iterator[tuple[float, np.ndarray]]:
    """As `decode_video`, one frame after another: hundreds of large ones need not be in memory together."""
    try:
        with av.open(io.BytesIO(data), "r", format=_container(data)) as container:
            if not container.streams.video:
                raise DataError("video cannot be decoded: no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > MAX_PIXELS:
                raise DataError(f"video too large: {pixels} pixels a frame, at most {MAX_PIXELS} are decoded")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # a later frame may be larger
            packets, left = [], 4 * len(data)
            for packet in container.demux(stream):
                left -= packet.size
                if left < 0:  # an index that names the same bytes again and again fills the memory
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
            converter = VideoReformatter()  # one for all: setting it up costs more than converting a small frame
            found = False
            for frame in _decode_at(stream, packets, targets):
                found = True
                yield float((_ticks(frame) - ticks[0]) * second), _upright_frame(frame, converter)
            if not found:
                raise DataError("video cannot be decoded: no frames")
    except DataError:
        raise
    except Exception as error:  # whatever FFmpeg throws at malformed bytes
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


def to_patches(pixels: np.ndarray, grid: tuple[int, int], patch_size: int, merge: int) -> np.ndarray:
    """Resize pixels [h, w, 3] to `grid` (patch rows, columns) and cut them up: uint8 [p, C].

    Cells of merge x merge patches run row by row, and so do the patches inside a cell.
    """
    rows, columns = grid
    pixels = resized(pixels, rows * patch_size, columns * patch_size)
    parts = pixels.reshape(rows // merge, merge, patch_size, columns // merge, merge, patch_size, 3)
    cells = parts.transpose(0, 3, 1, 4, 6, 2, 5)  # cell row, cell column, patch row, patch column, channel, y, x
    return cells.reshape(rows * columns, 3 * patch_size**2)


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing: [h, w, 3] -> [height, width, 3].

    PyTorch's is four times as fast as Pillow's, and differs from it by rounding (benchmarks/data.py prints how much).
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch  # whose import takes seconds; the data tools only decode

    with torch.inference_mode():
        planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1).unsqueeze(0)
        planes = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
        return planes[0].permute(1, 2, 0).numpy()


def _jpeg_pixels(data: bytes, least: tuple[int, int]) -> np.ndarray | None:
    """A JPEG as Pillow decodes it, sooner, at least `least` pixels wide and high; None for what libjpeg warns of."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_width=least[0], min_height=least[1])
    except ValueError:
        return None


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


def _container(data: bytes) -> str:
    """FFmpeg's name of the container. It would open what it guesses, and a playlist names files of this machine."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise DataError("video cannot be decoded: neither MP4, WebM, Matroska nor AVI")


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
    middles = ticks[0] + (np.arange(frames) + 0.5) * float(_duration(ticks)) / frames
    return [ticks[i] for i in np.unique(np.searchsorted(ticks, middles, side="right") - 1)]


def _duration(ticks: list[int]) -> Fraction:
    """In ticks; the last frame is shown as long as the others, on average."""
    return Fraction((ticks[-1] - ticks[0]) * len(ticks), max(1, len(ticks) - 1))


def _decode_at(stream: av.VideoStream, packets: list[av.Packet], targets: list[int]) -> Iterator[av.VideoFrame]:
    """For each of the sorted `targets` the first frame that is not before it, without decoding the groups of pictures
    between targets.
    """
    decoder = stream.codec_context
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe] or [0]
    last: av.VideoFrame | None = None
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
        if waiting and waiting[0] is not last:
            last = waiting[0]
            yield last


def _upright_frame(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    # One thread: by default every converter starts one for each of the machine's cores.
    pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels
