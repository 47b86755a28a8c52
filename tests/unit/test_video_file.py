"""What docs/data.md promises of videos, in every container: square pixels, upright, no covers, cut and damaged ones."""

from __future__ import annotations

import io
import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data_tools.check import CHECKED_FRAMES, Reencoding, Rejected, check
from data_tools.formats import Record
from dsmoe_vl.data.decode import decode_video
from dsmoe_vl.errors import DataError

# Each tenth frame of H.264 is a keyframe, and none refers to a later one.
IN_ORDER = {"bf": "0", "x264-params": "scenecut=0"}
KINDS = {"mp4": "libx264", "matroska": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}
SIZE = (64, 48)


def frame_of(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Noise, bright in the upper left quarter; its level rises with the number."""
    noise = np.random.default_rng(number).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    noise[: size[1] // 2, : size[0] // 2] += np.uint8(100 + number)
    return Image.fromarray(noise)


def film(kind: str, count: int = 40, shape: Fraction | None = None, cover: bool = False, **options: str) -> bytes:
    """Films with the index of an MP4 at its end, or with `faststart` at its beginning."""
    buffer = io.BytesIO()
    faststart = options.pop("faststart", "")
    with av.open(buffer, "w", format=kind) as output:
        if cover:
            picture = output.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 200, 200, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        stream = output.add_stream(KINDS[kind], rate=25, options={"g": "10", **options})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        if shape:
            stream.codec_context.sample_aspect_ratio = shape
            stream.sample_aspect_ratio = shape
        if cover:
            output.mux(picture.encode(av.VideoFrame.from_image(frame_of(0, (200, 200)))))
            output.mux(picture.encode())
        for i in range(count):
            frame = av.VideoFrame.from_image(frame_of(i))
            frame.pts, frame.time_base = i, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    data = index_first(buffer.getvalue()) if faststart else buffer.getvalue()
    if shape and kind == "webm":  # VP9 has no pixel shape, and PyAV sets none: DisplayWidth for DefaultDuration
        size = bytes([0x40, 0x30])
        shown = bytes([round(64 * shape), 48] if shape > 1 else [64, round(48 / shape)])
        at = data.find(b"\xe0\x86\xb0\x81%c\xba\x81%c" % (*size,))
        video = b"\xe0\x8e" + data[at + 2 : at + 8] + b"\x54\xb0\x81%c\x54\xba\x81%c" % (*shown,)
        data = data[: at - 8] + video + data[at + 8 :]
    return data


def index_first(data: bytes) -> bytes:
    """An MP4 with its index before its frames."""
    at, size = data.find(b"mdat") - 4, len(data) - data.find(b"moov") + 4
    moov = bytearray(data[-size:])
    place = moov.find(b"stco") + 12
    offsets = np.frombuffer(bytes(moov[place:]), ">u4", int.from_bytes(moov[place - 4 : place], "big")) + size
    moov[place : place + 4 * len(offsets)] = offsets.astype(">u4").tobytes()
    return data[:at] + bytes(moov) + data[at:-size]


def converted(data: bytes) -> object:
    class InMemory:
        suffix = ".any"

        @staticmethod
        def read_bytes() -> bytes:
            return data

    return check(Record("a", "video", InMemory(), ["a film"]), "test", Reencoding())


class TestGeometry:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("shape", "size"),
        [
            (None, (64, 48)),
            (Fraction(1, 1), (64, 48)),
            (Fraction(2, 1), (128, 48)),
            (Fraction(1, 3), (64, 144)),
            (Fraction(16, 11), (93, 48)),
        ],
    )
    def test_pixels_are_square(self, kind, shape, size):
        data = film(kind, 4, shape)
        ((_, pixels),) = decode_video(data, 1)
        assert pixels.shape == (size[1], size[0], 3)
        corners = pixels[: size[1] // 3, : size[0] // 3].mean(), pixels[-size[1] // 3 :, -size[0] // 3 :].mean()
        assert corners[0] > corners[1] + 60
        found = converted(data)
        assert (found.meta["width"], found.meta["height"]) == size

    @pytest.mark.parametrize("shape", [Fraction(1000, 1), Fraction(1, 1000), Fraction(0, 1)])
    def test_absurd_shapes_are_ignored(self, shape):
        data = bytearray(film("mp4", 4, Fraction(2, 1)))
        at = data.find(b"pasp") + 4
        data[at : at + 8] = struct.pack(">II", shape.numerator, shape.denominator)
        assert decode_video(bytes(data), 1)[0][1].shape in ((48, 64, 3), (48, 128, 3))  # the stream's own, if any

    def test_turned_and_mirrored(self):
        data = bytearray(film("mp4", 2))
        ((_, stored),) = decode_video(bytes(data), 1)
        at = data.find(struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), data.find(b"tkhd"))
        # a b / c d of the matrix: x' = a x + c y, y' = b x + d y
        expected = {
            (1, 0, 0, 1): stored,
            (0, 1, -1, 0): np.rot90(stored, -1),
            (-1, 0, 0, -1): np.rot90(stored, 2),
            (0, -1, 1, 0): np.rot90(stored),
            (-1, 0, 0, 1): np.fliplr(stored),
            (1, 0, 0, -1): np.flipud(stored),
            (0, 1, 1, 0): stored.transpose(1, 0, 2),
            (0, -1, -1, 0): np.rot90(stored, 2).transpose(1, 0, 2),
            (0, 0, 0, 0): stored,
        }
        for (a, b, c, d), pixels in expected.items():
            numbers = [65536 * x for x in (a, b)] + [0] + [65536 * x for x in (c, d)] + [0, 0, 0, 1 << 30]
            data[at : at + 36] = struct.pack(">9i", *numbers)
            np.testing.assert_array_equal(decode_video(bytes(data), 1)[0][1], pixels, err_msg=f"{a} {b} {c} {d}")
            with av.open(io.BytesIO(bytes(data))) as opened:
                turned = next(opened.decode(video=0)).rotation
            if a * d > b * c:  # no mirror: PyAV's angle says the same
                np.testing.assert_array_equal(pixels, np.rot90(stored, round(turned / 90)))

    def test_a_cover_is_not_the_film(self, shared_data):
        folder = shared_data / "faults" / "cover_art_first"
        plain, first, last = (
            decode_video((folder / f"{name}.mp4").read_bytes(), 4) for name in ("plain", "cover_first", "cover_last")
        )
        for (seconds, pixels), *others in zip(plain, first, last, strict=True):
            for other_seconds, other in others:
                assert other_seconds == seconds and pixels.shape == (96, 128, 3)
                np.testing.assert_array_equal(other, pixels)

    def test_a_cover_alone_is_no_film(self):
        data = film("mp4", 0, cover=True)
        with pytest.raises(DataError, match="no video stream"):
            decode_video(data, 4)


class TestCutShort:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.94])
    def test_below_the_limit_it_is_refused(self, kind, share):
        for faststart in ("", "yes") if kind == "mp4" else ("",):
            data = film(kind, faststart=faststart)
            with pytest.raises(
                DataError, match=r"video cannot be decoded: (cut short, .* bytes are there|the index of)"
            ):
                decode_video(data[: int(share * len(data))], 4)
            assert isinstance(converted(data[: int(share * len(data))]), Rejected)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("share", [0.96, 0.98, 0.9999])
    def test_above_it_what_is_there_is_used(self, kind, share):
        data = film(kind, faststart="yes" if kind == "mp4" else "")
        frames = decode_video(data[: int(share * len(data))], 8)
        whole = decode_video(data, 8)
        assert len(frames) == 8
        np.testing.assert_array_equal(frames[0][1], whole[0][1])
        assert "cut short, but at least 95 % is there" in converted(data[: int(share * len(data))]).notes

    def test_trailers_of_other_programs_cut_nothing(self):
        data = film("mp4")
        for trailer in (
            b"SEFT",
            b"\0\0\0\x10free" + bytes(2),
            bytes(3),
            b"\xff" * 40,
            b"\x7f\xff\xff\xffskip" + bytes(9),
        ):
            np.testing.assert_array_equal(decode_video(data + trailer, 2)[0][1], decode_video(data, 2)[0][1])

    def test_recordings_of_unknown_size_are_whole(self):
        class Pipe(io.RawIOBase):
            def __init__(self) -> None:
                self.parts: list[bytes] = []

            def writable(self) -> bool:
                return True

            def write(self, part) -> int:
                self.parts.append(bytes(part))
                return len(part)

        pipe = Pipe()
        source = io.BytesIO(film("matroska", **IN_ORDER))
        with av.open(source) as opened, av.open(pipe, "w", format="matroska") as output:
            copy = output.add_stream_from_template(opened.streams.video[0])
            for packet in opened.demux(video=0):
                if packet.dts is not None:
                    packet.stream = copy
                    output.mux(packet)
        data = b"".join(pipe.parts)
        assert len(decode_video(data, 8)) == 8
        assert 1 <= len(decode_video(data[: len(data) // 2], 8)) <= 8


class TestDamagedPackets:
    def packets(self, data: bytes) -> list[tuple[int, int, bool]]:
        """Place, size and whether it is a keyframe, of every packet."""
        with av.open(io.BytesIO(data)) as opened:
            found = [(bytes(packet), packet.is_keyframe) for packet in opened.demux(video=0) if packet.size]
        places = [(data.find(body), len(body), key) for body, key in found]
        assert all(place > 0 for place, *_ in places)
        return places

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_packet_refuses_no_film_whichever_frames_are_drawn(self, kind):
        data = film(kind)
        packets = self.packets(data)
        for number in (0, 1, 5, 10, 14, 20, 39):
            place, size, _ = packets[min(number, len(packets) - 1)]
            bad = bytearray(data)
            bad[place : place + size] = bytes(size) if kind == "avi" else b"\xff" * size
            for frames, sampling in itertools.product((1, 3, 8, CHECKED_FRAMES, 64), ("uniform", "keyframes", "first")):
                shown = decode_video(bytes(bad), frames, sampling)
                assert 1 <= len(shown) <= frames
                assert all(pixels.shape == (48, 64, 3) for _, pixels in shown)
            assert not isinstance(converted(bytes(bad)), Rejected)

    @pytest.mark.parametrize("kind", ["mp4", "matroska", "webm"])
    def test_a_damaged_frame_is_replaced_by_the_next_that_can_be_decoded(self, kind):
        data = film(kind, **(IN_ORDER if kind != "webm" else {}))
        whole = decode_video(data, 1000)
        bad = bytearray(data)
        for place, size, _ in self.packets(data)[:10]:  # the first group of pictures
            bad[place : place + size] = b"\xff" * size
        ((seconds, pixels),) = decode_video(bytes(bad), 1, "first")
        assert seconds == pytest.approx(0.4, abs=0.01)
        np.testing.assert_array_equal(pixels, whole[10][1])
        note = "damaged frames, replaced by the next ones that can be decoded"
        assert note in converted(bytes(bad)).notes

    def test_after_the_last_that_can_be_decoded_that_one_is_shown(self):
        data = film("matroska", **IN_ORDER)
        whole = decode_video(data, 1000)
        bad = bytearray(data)
        for place, size, _ in self.packets(data)[20:]:
            bad[place : place + size] = b"\xff" * size
        ((seconds, pixels),) = decode_video(bytes(bad), 1, "uniform")  # the frame in the middle is the 20th
        assert seconds == pytest.approx(0.76, abs=0.01)
        np.testing.assert_array_equal(pixels, whole[19][1])

    @pytest.mark.parametrize("kind", ["mp4", "matroska", "webm"])
    def test_without_any_frame_it_is_refused_by_all(self, kind):
        data = film(kind)
        bad = bytearray(data)
        for place, size, _ in self.packets(data):
            bad[place : place + size] = b"\xff" * size
        for frames in (1, 8, 64):
            with pytest.raises(DataError, match="video cannot be decoded: no frames"):
                decode_video(bytes(bad), frames)
        assert isinstance(converted(bytes(bad)), Rejected)
