"""One encoded video in memory: its stream, the times of its frames, its geometry, and frames at chosen times.

What is promised for every container is in docs/data.md.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from dsmoe_vl.data.container_file import reading
from dsmoe_vl.data.media_kind import HEAD, container
from dsmoe_vl.errors import DataError

LEAST_SHARE = 0.95  # of the bytes that a container states must be in the file

_PICTURES = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
# PyAV 17 starts one thread per core for every converter, and has a setting for it; before, it was one thread.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
_NO_INDEX = (
    "the index of an MP4 (moov) is missing, as after an interrupted recording or copy: copy it again, or have a repair "
    "program make a new index"
)
_WIDEST_PIXEL = 8  # greatest ratio of a pixel's sides; more is damage


class VideoFile:
    """The first video stream that is not a cover or another attached picture.

    `packets` are in the order of the file, `ticks` the sorted times of its frames in units of `second`. `is_cut`: fewer
    bytes are there than the container states. `damaged` counts the packets that the decoder has refused so far.
    """

    def __init__(self, opened: av.container.InputContainer, size: int, is_cut: bool, max_pixels: int) -> None:
        self.stream = real_stream(opened)
        self.is_cut = is_cut
        self.damaged = 0
        self._decoder = self.stream.codec_context
        self.stream.thread_type = "NONE"
        self.pixel_shape = _pixel_shape(self.stream)
        width, height = self._shown(self._decoder.width, self._decoder.height)
        if width * height > max_pixels:
            raise DataError(f"video too large: {width * height} pixels per frame, at most {max_pixels} are decoded")
        self._decoder.options = {"max_pixels": str(max_pixels)}  # a later frame may be larger
        self.packets = self._packets(opened, size)
        self.ticks = sorted({_ticks(packet) for packet in self.packets})
        if not self.ticks:
            raise DataError("video cannot be decoded: no frames")
        self.second = self.stream.time_base or Fraction(1)

    def times(self) -> list[float]:
        """Seconds of every packet, sorted."""
        return sorted(_ticks(packet) * float(self.stream.time_base or 0) for packet in self.packets)

    def frames(self, count: int, sampling: str, per_second: float) -> Iterator[tuple[float, np.ndarray]]:
        """As `decode.iterate_video`. Raises DataError if no frame can be decoded."""
        converter = VideoReformatter()  # creating one costs more than converting a small frame
        for frame in self._decode_at(self._targets(count, sampling, per_second)):
            yield float((_ticks(frame) - self.ticks[0]) * self.second), self._pixels(frame, converter)

    def _packets(self, opened: av.container.InputContainer, size: int) -> list[av.Packet]:
        packets: list[av.Packet] = []
        left = 4 * size
        try:
            for packet in opened.demux(self.stream):
                left -= packet.size
                if left < 0:  # an index that repeats the same bytes would fill the memory
                    raise DataError("video cannot be decoded: its frames are larger than the file")
                if packet.size:
                    packets.append(packet)
        except av.error.FFmpegError:
            if not self.is_cut:
                raise
        return packets

    def _targets(self, count: int, sampling: str, per_second: float) -> list[int]:
        """The times of the chosen frames."""
        if sampling == "keyframes":
            keys = sorted({_ticks(packet) for packet in self.packets if packet.is_keyframe}) or self.ticks[:1]
            return [keys[i] for i in np.unique((np.arange(count) + 0.5) * len(keys) // count).astype(int)]
        if sampling == "first":
            return self.ticks[:1]
        if sampling == "fps":
            count = min(count, max(1, round(_duration(self.ticks) * self.second * per_second)))
        return _uniform(self.ticks, count)

    def _decode_at(self, targets: list[int]) -> Iterator[av.VideoFrame]:
        """For each of the sorted `targets` the first frame at or after it that can be decoded; if there is none for
        any of them, the last one before. Skips groups of pictures between targets."""
        packets = self.packets
        keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe] or [0]
        last: av.VideoFrame | None = None
        fed = 0  # packets given to the decoder or skipped
        waiting: list[av.VideoFrame] = []  # decoded, after the last target
        for target in targets:
            key = max((i for i in keyframes if _ticks(packets[i]) <= target), default=0)
            if key > fed:
                self._decoder.flush_buffers()
                fed, waiting = key, []
            while True:
                waiting = [frame for frame in waiting if _ticks(frame) >= target]
                if waiting or fed > len(packets):
                    break
                waiting = self._decoded(fed)
                fed += 1
            if waiting and waiting[0] is not last:
                last = waiting[0]
                yield last
        if last is None:
            yield self._last_frame()

    def _last_frame(self) -> av.VideoFrame:
        self._decoder.flush_buffers()
        last: av.VideoFrame | None = None
        for fed in range(len(self.packets) + 1):
            frames = self._decoded(fed)
            last = frames[-1] if frames else last
        if last is None:
            raise DataError("video cannot be decoded: no frames")
        return last

    def _decoded(self, number: int) -> list[av.VideoFrame]:
        """The frames that the decoder returns for a packet; after the last packet, those that are left in it."""
        try:
            return list(self._decoder.decode(self.packets[number] if number < len(self.packets) else None))
        except av.error.FFmpegError as error:
            if error.errno == errno.EINVAL:  # a size above max_pixels; versions of PyAV name it differently
                raise
            self.damaged += 1
            return []

    def _shown(self, width: int, height: int) -> tuple[int, int]:
        """The size with square pixels of a stored frame. One side grows, so that nothing is lost."""
        shape = self.pixel_shape
        return (round(width * shape), height) if shape > 1 else (width, round(height / shape))

    def _pixels(self, frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
        width, height = self._shown(frame.width, frame.height)
        pixels = converter.reformat(frame, width, height, "rgb24", **_ONE_THREAD).to_ndarray()
        return _upright(pixels, frame)


@contextmanager
def open_video(data: bytes, max_pixels: int) -> Iterator[VideoFile]:
    """Open a video.

    Raises DataError, also for errors of FFmpeg in the `with` block, if `data` is not a video, was cut short, cannot be
    decoded, or has frames of more than `max_pixels`.
    """
    form = _safe_container(data)
    stated = _STATED_SIZE[form](data)
    if len(data) < LEAST_SHARE * stated:
        raise DataError(f"video cannot be decoded: cut short, {len(data)} of {stated} bytes are there")
    try:
        with reading(data, form, "video") as opened:
            yield VideoFile(opened, len(data), len(data) < stated, max_pixels)
    except DataError as error:
        if form == "mov" and all(kind != b"moov" for kind, _ in _iso_boxes(data)):
            raise DataError(f"video cannot be decoded: {_NO_INDEX}") from error
        raise


def frame_size(data: bytes) -> tuple[int, int]:
    """Width and height of a video's frames by its header, as they are coded. Raises DataError."""
    with reading(data, _safe_container(data), "video") as opened:
        codec = real_stream(opened).codec_context
        return codec.width, codec.height


def _safe_container(data: bytes) -> str:
    """FFmpeg's name of a container that can have nothing but media: others, such as playlists, can open other files."""
    form = container(data[:HEAD])
    if form not in _STATED_SIZE:
        raise DataError("video cannot be decoded: neither MP4, WebM, Matroska nor AVI")
    return form


def real_stream(opened: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that can be decoded and is not an attached picture. Raises DataError."""
    streams = [stream for stream in opened.streams.video if not stream.disposition & _PICTURES]
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise DataError(f"video cannot be decoded: {'unknown codec' if streams else 'no video stream'}")
    return decodable[0]


def _pixel_shape(stream: av.VideoStream) -> Fraction:
    """Width / height of a pixel; 1 if it is not stated, or absurd."""
    shape = stream.sample_aspect_ratio or Fraction(1)
    return shape if Fraction(1, _WIDEST_PIXEL) <= shape <= _WIDEST_PIXEL else Fraction(1)


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn and mirror as the display matrix says, to the nearest multiple of 90 degrees."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if a * d == b * c:
        return pixels
    across, down = a, d
    if abs(b) > abs(a):
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    return pixels[:: 1 if down >= 0 else -1, :: 1 if across >= 0 else -1]


def _iso_boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The outermost boxes of an MP4: their kinds, and where they end by their own statement."""
    at = 0
    while at + 16 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        end = at + size if size >= 8 else len(data)  # 0: up to the end
        yield data[at + 4 : at + 8], end
        at = end


def _iso_size(data: bytes) -> int:
    """The end of the last box, if it has frames or their index; trailers of other kinds are not looked at."""
    ends = (end for kind, end in _iso_boxes(data) if kind in (b"mdat", b"moov", b"moof"))
    return max(len(data), *ends, 0)


def _matroska_size(data: bytes) -> int:
    """The end of the segment; what is there, if its size is unknown, as in live recordings."""
    at = 0
    for identifier in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):  # the header, then the segment
        if data[at : at + 4] != identifier or at + 5 > len(data):
            return len(data)
        length = 9 - data[at + 4].bit_length()  # of the size: as many bytes as zeros before its first bit, and one
        size = int.from_bytes(data[at + 4 : at + 4 + length], "big") & ((1 << 7 * length) - 1)
        if size == (1 << 7 * length) - 1:
            return len(data)
        at += 4 + length + size
    return at


def _avi_size(data: bytes) -> int:
    """The end of the last RIFF; what is there, if its size was not written, as in interrupted recordings."""
    at = 0
    while data[at : at + 4] == b"RIFF":
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
            return len(data)
        at += 8 + size + size % 2
    return at


_STATED_SIZE = {"mov": _iso_size, "matroska": _matroska_size, "avi": _avi_size}


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
