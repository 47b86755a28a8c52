"""Titles in any encoding cost no video and no recording; what a container lacks is named."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data_tools.check import Reencoding, video_facts
from data_tools.recordings import recording_facts
from dsmoe_vl.data.decode import decode_video
from dsmoe_vl.data.foreign_media import stored
from dsmoe_vl.data.recording import decode_recording
from dsmoe_vl.data.video_file import frame_size
from dsmoe_vl.errors import DataError
from tests.support.sound_files import KINDS, recording

TITLE = "a title in ASCII"
ODD = {
    "Latin-1": b"Caf\xe9 de la gare\xe0",
    "cut UTF-8": b"a title in ASC\xe2\x82",
    "no text": bytes(range(240, 256)),
}
FILMS = {
    "avi": "mpeg4",
    "mp4": "mpeg4",
    "mov": "mpeg4",
    "matroska": "mpeg4",
    "webm": "libvpx",
    "flv": "libx264",
    "mpegts": "mpeg4",
}


def film(form: str, codec: str, times: list[float] | None = None) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as output:
        output.metadata.update({"title": TITLE, "service_name": TITLE})
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000 if times else 25)
        for number, second in enumerate(times or [one / 25 for one in range(12)]):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (20 * number,) * 3))
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(second / frame.time_base)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def sound(kind: str, tag: bytes) -> bytes:
    """A recording with a title in its own kind of metadata."""
    data = recording(kind)
    if kind == "mp3":  # ID3v2.3, the same title as Latin-1, UTF-16 and UTF-8
        size = (len(tag) + 1).to_bytes(4, "big")
        frames = b"".join(b"TIT2" + size + b"\0\0" + bytes([encoding]) + tag for encoding in (0, 1, 3))
        return b"ID3\3\0\0" + bytes([0, 0, len(frames) >> 7, len(frames) & 127]) + frames + data
    if kind == "wav":
        chunk = b"INFOINAM" + struct.pack("<I", len(tag)) + tag
        return data + b"LIST" + struct.pack("<I", len(chunk)) + chunk
    first, comment = 42, b"TITLE=" + tag  # where the first block of a FLAC ends
    body = struct.pack("<I4sII", 4, b"self", 1, len(comment)) + comment
    return data[:first] + bytes([4]) + len(body).to_bytes(3, "big") + body + data[first:]


@pytest.mark.parametrize("title", ODD)
@pytest.mark.parametrize("form", FILMS)
def test_videos(form, title):
    plain = film(form, FILMS[form])
    assert TITLE.encode() in plain
    data = plain.replace(TITLE.encode(), ODD[title])
    _, _, facts, _ = video_facts(data, Reencoding())
    assert (facts["width"], facts["height"], facts["fps"]) == (64, 48, 25)
    made = stored(data).data
    assert frame_size(made) == (64, 48)
    for (_, ours), (_, theirs) in zip(decode_video(made, 4), decode_video(stored(plain).data, 4), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("title", ODD)
@pytest.mark.parametrize("kind", ["flac", "wav", "mp3"])
def test_recordings(kind, title):
    data = sound(kind, ODD[title])
    np.testing.assert_array_equal(decode_recording(data), decode_recording(recording(kind)))
    assert recording_facts(data)[0] == KINDS[kind][1]


@pytest.mark.parametrize(("form", "codec"), [("flv", "flv1"), ("asf", "wmv1"), ("asf", "wmv2")])
def test_codecs_that_matroska_has_no_place_for_are_stored_in_avi(form, codec):
    times = [0.0, 0.04, 0.5, 0.51, 3.0]
    data, extension, facts, notes = video_facts(film(form, codec, times), Reencoding())
    assert extension == "avi" and notes == (f"{'FLV' if form == 'flv' else 'ASF'} stored as AVI",)
    assert [round(second, 3) for second, _ in decode_video(data, 100)] == times
    assert facts["fps"] == round(4 / 3, 3)
    np.testing.assert_allclose([pixels.mean() for _, pixels in decode_video(data, 100)], range(0, 100, 20), atol=6)


@pytest.mark.parametrize("form", ["mp4", "mov", "3gp"])
def test_an_mp4_without_its_index_says_so(form):
    data = film(form, "mpeg4")
    data = data[: data.index(b"moov") - 4]
    with pytest.raises(DataError, match=r"^video cannot be decoded: the index of an MP4 \(moov\) is missing, "):
        decode_video(data, 4)


@pytest.mark.parametrize("form", ["mp4", "avi", "matroska"])
def test_errors_of_ffmpeg_have_neither_numbers_nor_names(form):
    data = film(form, FILMS[form])
    with pytest.raises(DataError) as error:
        decode_video(data[:40] + bytes(len(data) - 40), 4)
    assert "Errno" not in str(error.value) and "<none>" not in str(error.value)
