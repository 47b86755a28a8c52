"""TIFFs: sound ones are used whatever their tags say, raw photos are refused, and damage is named."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data_tools.check import DAMAGED_METADATA, Reencoding, image_facts
from dsmoe_vl.data.decode import decode_image
from dsmoe_vl.data.foreign_media import stored
from dsmoe_vl.data.media_kind import HEAD, media_kind
from dsmoe_vl.errors import DataError
from tests.support.tars import encoded_as, picture

PICTURE = picture()
# Tags: the kind of a picture (1: a small copy, 2: a page), pictures inside it, and places of EXIF and GPS.
SUBFILE, PAGES_INSIDE, EXIF_AT, GPS_AT, DNG, ORIENTATION = 254, 330, 34665, 34853, 50706, 274
LONG, SHORT = 4, 3


def tiff_with(tags: dict[int, int], **options: object) -> bytes:
    entries = ImageFileDirectory_v2()
    for tag, value in tags.items():
        entries.tagtype[tag] = SHORT if tag == ORIENTATION else LONG
        entries[tag] = value
    return encoded_as(PICTURE, "TIFF", tiffinfo=entries, **options)


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}])
@pytest.mark.parametrize("tags", [{}, {SUBFILE: 1}, {SUBFILE: 2}, {EXIF_AT: 999_999}, {GPS_AT: 3}, {ORIENTATION: 1}])
def test_sound_ones_are_used(tags, options):
    data = tiff_with(tags, **options)
    made = stored(data)
    assert (media_kind(data[:HEAD]), made.extension, made.note) == ("image", "png", "TIFF stored as PNG")
    np.testing.assert_array_equal(decode_image(made.data), np.asarray(PICTURE))


@pytest.mark.parametrize(
    "raw",
    [tiff_with({SUBFILE: 1, PAGES_INSIDE: 8}), tiff_with({DNG: 1}), b"II*\0\x10\0\0\0CR\2\0" + bytes(100)],
    ids=["a preview with pictures inside it", "DNG", "CR2"],
)
def test_raw_photos_are_refused(raw):
    with pytest.raises(DataError, match=r"^image cannot be decoded: a raw photo is not supported; save it as a JPEG$"):
        stored(raw)


@pytest.mark.parametrize("mark", [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"GIF89a", b"\0\0\0\x0cjP  \r\n\x87\n"])
def test_a_beginning_alone_is_named(mark):
    with pytest.raises(DataError, match=r"^image cannot be decoded: ") as error:
        stored(mark + bytes(100))
    assert "BytesIO" not in str(error.value)


def test_damaged_tags_are_noted():
    assert image_facts(tiff_with({ORIENTATION: 99}), Reencoding())[3] == ("TIFF stored as PNG", DAMAGED_METADATA)
    assert image_facts(tiff_with({ORIENTATION: 6}), Reencoding())[2:] == (
        {"width": PICTURE.height, "height": PICTURE.width},
        ("TIFF stored as PNG",),
    )


def test_damaged_tags_print_no_warnings(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, EXIF_AT, LONG, 1) + struct.pack("<II", 999_999, 0)
    cut = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, ORIENTATION, 2, 999) + struct.pack("<II", 999_999, 0)
    files = {
        "a.tif": tiff_with({EXIF_AT: 999_999}),
        "b.jpg": encoded_as(PICTURE, "JPEG", exif=exif),
        "c.jpg": encoded_as(PICTURE, "JPEG", exif=cut),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name[0]}.txt").write_text("a photo")
    command = [sys.executable, "-m", "data_tools.convert", "folder", "--media", tmp_path, "--output", tmp_path / "o"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr and "wrote 3 samples" in done.stdout
