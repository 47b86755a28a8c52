import contextlib
import io
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dsmoe_vl.data import decode
from dsmoe_vl.data.decode import decode_image, decode_video, fit_grid, to_patches
from dsmoe_vl.errors import DataError
from tests.support.tars import encoded_as, picture


def video(
    container: str, codec: str, ticks: list[int], audio: bool = False, size: tuple[int, int] = (64, 48), **options: str
) -> bytes:
    """Frame i is grey of level 4 * i and shown at ticks[i] / 25 seconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        sound = output.add_stream("aac", rate=8000, layout="mono") if audio else None
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 8000, 0
            output.mux(sound.encode(silence))
            output.mux(sound.encode())
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (4 * i,) * 3))
            frame.pts, frame.time_base = tick, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def levels(frames: list[tuple[float, np.ndarray]]) -> list[int]:
    """The numbers of the frames of `video` that were chosen."""
    return [round(float(image.mean()) / 4) for _, image in frames]


def test_transparency_becomes_white_in_every_mode() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 10, 10, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 200, 10, 10])
    palette.paste(0, (0, 0, 4, 8))
    files = {
        "RGBA": encoded_as(clear, "PNG"),
        "webp": encoded_as(clear, "WEBP", lossless=True),
        "palette": encoded_as(palette, "PNG", transparency=1),
        "keyed RGB": encoded_as(palette.convert("RGB"), "PNG", transparency=(200, 10, 10)),
    }
    for name, data in files.items():
        image = decode_image(data)
        assert (image.dtype, image.shape) == (np.uint8, (8, 8, 3))
        assert (image[0, 0].tolist(), image[7, 7].tolist()) == ([0, 0, 255], [255, 255, 255]), name
    grey = Image.new("LA", (4, 4), (90, 0))
    assert decode_image(encoded_as(grey, "PNG"))[0, 0].tolist() == [255, 255, 255]


def test_grey_cmyk_and_16_bit() -> None:
    deep = Image.fromarray(np.full((4, 4), 128 * 256 + 77, np.uint16))
    assert decode_image(encoded_as(deep, "PNG"))[0, 0].tolist() == [128] * 3
    assert decode_image(encoded_as(Image.new("L", (4, 4), 77), "PNG"))[0, 0].tolist() == [77] * 3
    assert decode_image(encoded_as(Image.new("1", (4, 4), 1), "PNG"))[0, 0].tolist() == [255] * 3
    cyan = decode_image(encoded_as(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"))[8, 8]
    np.testing.assert_allclose(cyan, (0, 255, 255), atol=12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    upright = picture(48, 32)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encoded_as(stored, "JPEG", exif=exif, quality=95, subsampling=0))
    assert image.shape == (32, 48, 3)
    np.testing.assert_allclose(np.asarray(image, int), np.asarray(upright, int), atol=12)


def test_malformed_images_are_data_errors() -> None:
    photo = encoded_as(picture(64, 64), "JPEG")
    bad = {"empty": b"", "text": b"hello world", "cut": photo[: len(photo) // 2], "gif": encoded_as(picture(), "GIF")}
    for data in bad.values():
        with pytest.raises(DataError, match="image cannot be decoded"):
            decode_image(data)


def test_random_damage_raises_nothing_else(shared_data: Path) -> None:
    rng = np.random.default_rng(0)
    photo = next(iter(sorted((shared_data / "coco_cc_by" / "val2017").glob("*.jpg")))).read_bytes()
    originals = [photo[:20000], encoded_as(picture(), "PNG"), encoded_as(picture(), "WEBP")]
    for original, _ in itertools.product(originals, range(40)):
        data = bytearray(original)
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(256)
        with contextlib.suppress(DataError):
            assert decode_image(bytes(data)).dtype == np.uint8


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = encoded_as(Image.new("1", (20000, 20000)), "PNG")
    with pytest.raises(DataError, match="image"):
        decode_image(flat)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="image too large: 48 x 32 pixels, at most 1000"):
        decode_image(encoded_as(picture(48, 32), "PNG"))
    with pytest.raises(DataError, match="video too large"):
        decode_video(video("mp4", "libx264", [0]), 1)


def test_large_jpegs_are_decoded_smaller_but_never_too_small() -> None:
    data = encoded_as(picture(640, 480), "JPEG")
    assert decode_image(data).shape == (480, 640, 3)
    for enough in (64 * 64, 224 * 224, 600 * 400, 10**6):
        height, width = decode_image(data, enough).shape[:2]
        assert width * height >= min(enough, 640 * 480)
    assert decode_image(data, 64 * 64).shape == (60, 80, 3)


def test_jpegs_have_the_pixels_that_pillow_gives_them(shared_data: Path) -> None:
    for photo in sorted((shared_data / "coco_cc_by").glob("*2017/*.jpg")):
        with Image.open(photo) as opened:
            theirs = np.asarray(opened.convert("RGB"))
        np.testing.assert_array_equal(decode_image(photo.read_bytes()), theirs, err_msg=photo.name)


def test_resizing_agrees_with_pillow(shared_data: Path) -> None:
    for photo in sorted((shared_data / "coco_cc_by").glob("val2017/*.jpg")):
        pixels = decode_image(photo.read_bytes())
        for height, width in ((224, 224), (192, 256), (48, 64)):
            theirs = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
            error = np.square(decode.resized(pixels, height, width) - theirs).mean()
            assert 10 * np.log10(255**2 / error) > 55, photo.name  # dB
    upright = np.rot90(pixels)  # a view with negative strides
    assert np.array_equal(decode.resized(upright, 64, 48), decode.resized(upright.copy(), 64, 48))


def test_so_many_frames_a_second(shared_data: Path) -> None:
    data = (shared_data / "videos_intel" / "car-detection.mp4").read_bytes()  # 30 s
    chosen = decode_video(data, 64, "fps", 0.5)
    np.testing.assert_allclose([seconds for seconds, _ in chosen], np.arange(15) * 2 + 1, atol=0.2)
    assert len(decode_video(data, 8, "fps", 2.0)) == 8  # the whole video, more thinly
    assert len(decode_video(data, 8, "fps", 0.001)) == 1


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(video("mp4", "libx264", [0, 1]))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    for data in (playlist.encode(), f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n".encode()):
        with pytest.raises(DataError, match="neither MP4, WebM, Matroska nor AVI"):
            decode_video(data, 1)


def test_key_frames() -> None:
    data = video("mp4", "libx264", list(range(60)), g="10", **{"x264-params": "scenecut=0"})
    assert levels(decode_video(data, 8, "keyframes")) == [0, 10, 20, 30, 40, 50]
    assert levels(decode_video(data, 3, "keyframes")) == [10, 30, 50]
    assert levels(decode_video(data, 1, "keyframes")) == [30]


def test_real_photos(shared_data: Path) -> None:
    photos = sorted((shared_data / "coco_cc_by" / "train2017").glob("*.jpg"))[:8]
    assert photos
    for photo in photos:
        image = decode_image(photo.read_bytes(), 256 * 16**2)
        grid = fit_grid(image.shape[1], image.shape[0], 16, 2, 256)
        patches = to_patches(image, grid, 16, 2)
        assert patches.shape == (grid[0] * grid[1], 768)
        assert grid[0] * grid[1] >= 200
        assert patches.std() > 10


@pytest.mark.parametrize(
    ("size", "max_patches", "expected"),
    [
        ((64, 64), 64, (4, 4)),  # fits as it is
        ((10, 10), 64, (2, 2)),  # at least a cell
        ((640, 480), 1024, (28, 36)),
        ((480, 640), 1024, (36, 28)),
        ((10000, 20), 64, (2, 32)),
        ((20, 10000), 64, (32, 2)),
        ((5000, 5000), 4, (2, 2)),
    ],
)
def test_grid_of_known_sizes(size: tuple[int, int], max_patches: int, expected: tuple[int, int]) -> None:
    assert fit_grid(*size, 16, 2, max_patches) == expected


def test_grid_properties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = (int(side) for side in np.exp(rng.uniform(0, 8.5, 2)) + 1)
        patch_size, merge, cells = int(rng.integers(4, 33)), int(rng.integers(1, 4)), int(rng.integers(1, 300))
        rows, columns = fit_grid(width, height, patch_size, merge, cells * merge**2)
        cell = patch_size * merge
        assert rows % merge == columns % merge == 0
        assert merge**2 <= rows * columns <= cells * merge**2
        assert rows * patch_size <= max(cell, height + cell / 2)
        assert columns * patch_size <= max(cell, width + cell / 2)
        if min(rows, columns) >= 6 * merge:
            assert columns / rows == pytest.approx(width / height, rel=0.2)


def test_patch_order_is_cell_by_cell() -> None:
    size, merge, grid = 4, 2, (4, 6)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    expected = [
        pixels[row * size : (row + 1) * size, column * size : (column + 1) * size].transpose(2, 0, 1).ravel()
        for cell_row, cell_column in itertools.product(range(2), range(3))
        for row, column in itertools.product((2 * cell_row, 2 * cell_row + 1), (2 * cell_column, 2 * cell_column + 1))
    ]
    np.testing.assert_array_equal(to_patches(pixels, grid, size, merge), expected)


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"g": "10", "bf": "2"}),
        ("mp4", "libx264", {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
        ("matroska", "libx264", {"g": "250"}),
        ("webm", "libvpx-vp9", {"g": "8"}),
        ("avi", "mpeg4", {"g": "12"}),
        ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    ],
)
@pytest.mark.parametrize("frames", [1, 3, 5, 8])
def test_frames_are_the_middles_of_equal_parts(
    container: str, codec: str, options: dict[str, str], frames: int
) -> None:
    chosen = decode_video(video(container, codec, list(range(60)), **options), frames)
    expected = [int((i + 0.5) * 60 / frames) for i in range(frames)]
    assert levels(chosen) == pytest.approx(expected, abs=1)
    assert [seconds for seconds, _ in chosen] == pytest.approx([i / 25 for i in expected], abs=1.01 / 25)


def test_uniform_in_time_not_in_frames() -> None:
    ticks = [*range(40), 80, 120, 160]  # 25 frames a second, then one in 1.6 seconds
    chosen = decode_video(video("matroska", "libx264", ticks), 4)
    times = [round(seconds * 25) for seconds, _ in chosen]
    assert times == [ticks[level] for level in levels(chosen)]
    assert times == [20, 39, 80, 120]


def test_short_videos_give_each_frame_once() -> None:
    assert levels(decode_video(video("mp4", "libx264", [0, 1, 2]), 8)) == [0, 1, 2]
    assert levels(decode_video(video("mp4", "libx264", [5]), 8)) == [0]
    assert decode_video(video("mp4", "libx264", [5]), 8)[0][0] == 0.0


def test_audio_is_ignored() -> None:
    with_sound = video("mp4", "libx264", list(range(30)), audio=True)
    assert levels(decode_video(with_sound, 3)) == [5, 15, 25]


def test_malformed_videos_are_data_errors() -> None:
    whole = video("mp4", "libx264", list(range(20)))
    sound_only = io.BytesIO()
    with av.open(sound_only, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    for data in (b"", b"hello", whole[: len(whole) // 2], video("matroska", "libx264", []), sound_only.getvalue()):
        with pytest.raises(DataError, match="video cannot be decoded"):
            decode_video(data, 4)


def test_real_videos(shared_data: Path) -> None:
    for name in ("asl_gestures/again.mkv", "asl_gestures/want.mkv", "car-detection.mp4"):
        data = (shared_data / "videos_intel" / name).read_bytes()
        with av.open(io.BytesIO(data)) as container:
            every = [(frame.pts, frame.to_image()) for frame in container.decode(video=0)]
            second = float(container.streams.video[0].time_base)
        duration = (every[-1][0] - every[0][0]) * second
        chosen = decode_video(data, 4)
        np.testing.assert_allclose(
            [seconds for seconds, _ in chosen], (np.arange(4) + 0.5) * duration / 4, atol=duration / len(every) * 2
        )
        for seconds, image in chosen:
            same_time = [other for ticks, other in every if (ticks - every[0][0]) * second == pytest.approx(seconds)]
            np.testing.assert_array_equal(np.asarray(image), np.asarray(same_time[0]))
