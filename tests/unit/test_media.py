"""What users name, as samples: files, folders, shards, bytes, PIL images and arrays."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.errors import DataError
from dsmoe_vl.inference.media import BATCH, first_picture, in_batches, media_files, open_media, to_sample
from tests.support.datasets import clip, photo
from tests.support.samples import sample

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def decoded(given):
    made = to_sample(given, "image")
    return decode_image(made.media)


def test_every_form_of_a_picture_gives_its_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png(Image.fromarray(PIXELS)))
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), Image.fromarray(PIXELS)]
    for form in [*forms, PIXELS, PIXELS[:, ::-1][:, ::-1]]:
        assert np.array_equal(decoded(form), PIXELS)
    grey = PIXELS[..., 0]
    assert np.array_equal(decoded(grey), np.repeat(grey[..., None], 3, axis=2))
    opaque = np.dstack((PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)))
    assert np.array_equal(decoded(opaque), PIXELS)
    assert decoded(Image.fromarray(PIXELS).convert("CMYK")).shape == PIXELS.shape


def test_an_open_photo_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    upright = decoded(file.getvalue())
    assert upright.shape == (7, 5, 3)
    assert np.array_equal(decoded(Image.open(file)), upright)


NOT_PICTURES = {
    "floats": PIXELS / 255,
    "one axis more": PIXELS[None],
    "int64": PIXELS.astype(np.int64),
    "object": object(),
}


@pytest.mark.parametrize("given", NOT_PICTURES.values(), ids=NOT_PICTURES)
def test_what_is_no_picture(given):
    with pytest.raises(DataError, match=r"an image cannot be made from .*: give a path, bytes, a PIL image"):
        to_sample(given, "image")


def test_what_is_no_video(tmp_path):
    with pytest.raises(DataError, match="a video cannot be made from Image: give a path or encoded bytes"):
        to_sample(Image.new("RGB", (4, 4)), "video")
    with pytest.raises(DataError, match=r"none\.mp4: No such file or directory; name an existing file"):
        to_sample(tmp_path / "none.mp4", "video")


def test_first_picture():
    assert np.array_equal(first_picture(sample("image")), decode_image(sample("image").media))
    frames = decode_video(sample("video").media, 1000)
    assert frames[0][0] == 0
    assert np.array_equal(first_picture(sample("video")), frames[0][1])
    with pytest.raises(DataError, match="no image or video"):
        first_picture(sample("image", media=None))


def test_a_folder_in_the_order_of_names(tmp_path):
    for name in ("b.JPG", "deep/er/a.png", "c.txt"):
        photo(tmp_path / name)
    clip(tmp_path / "deep" / "z.mp4")
    found = open_media(str(tmp_path), DataConfig())
    assert [item.place for item in found] == [str(tmp_path / n) for n in ("b.JPG", "deep/er/a.png", "deep/z.mp4")]
    assert [item.read().media_type for item in found] == ["jpg", "jpg", "mp4"]
    assert all(item.size_bytes > 0 and item.mtime_ns > 0 for item in found)


def test_shards(tiny):
    found = open_media(str(tiny.data / "videos_eval"), DataConfig())
    assert len(found) == 4 and len({item.place for item in found}) == 4
    assert [item.read().media_type for item in found] == ["mp4"] * 4
    assert found[0].read().key == "videos_eval-0000000"


def test_folders_without_media(tmp_path):
    with pytest.raises(DataError, match=r"none: no such folder; name one with pictures, videos or shards"):
        open_media(str(tmp_path / "none"), DataConfig())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        DataError, match=r"no pictures, videos or shards in it; name a folder with files such as \*\.jpg"
    ):
        open_media(str(tmp_path), DataConfig())


def test_bad_files_are_named_and_the_others_go_on(tmp_path):
    paths = [photo(tmp_path / f"{n:02}.jpg") for n in range(BATCH + 2)]
    paths[3].write_text("no image")
    paths.insert(1, tmp_path / "missing.jpg")
    failed = []
    batches = list(
        in_batches(media_files(paths, "image"), lambda s: decode_image(s.media), lambda *told: failed.append(told))
    )
    assert [len(batch) for batch in batches] == [BATCH, 1]
    assert [name for batch in batches for _, name, _ in batch] == [str(p) for p in paths if p not in paths[1:5:3]]
    assert [name for name, _ in failed] == [str(paths[1]), str(paths[4])]
    assert "name an existing file" in failed[0][1]
    assert failed[1][1] == "image cannot be decoded: not a JPEG, PNG or WebP; save it as a JPEG, PNG or WebP"
