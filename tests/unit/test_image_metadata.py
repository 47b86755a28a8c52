"""Metadata never cost sound pixels, and never end a conversion."""

from __future__ import annotations

import io
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_tools.check import DAMAGED_METADATA, Reencoding, Rejected, check
from data_tools.convert import main
from data_tools.formats import Record, Stored
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.decode import decode_image, read_image
from dsmoe_vl.data.shards.index import iterate_samples
from tests.support.tars import encoded_as, picture

EXIF = b"Exif\0\0"


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with (marker, content) after its first segment."""
    plain = encoded_as(picture(), "JPEG")
    end = 4 + int.from_bytes(plain[4:6], "big")
    return plain[:end] + b"".join(segment(*one) for one in segments) + plain[end:]


def segment(marker: int, content: bytes, size: int | None = None) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2 if size is None else size).to_bytes(2, "big") + content


def tiff(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF with one entry."""
    return EXIF + b"II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, tag, kind, count) + value + bytes(8)


def png_with(*chunks: bytes, at_end: bool = False) -> bytes:
    plain = encoded_as(picture(), "PNG")
    at = len(plain) - 12 if at_end else 33
    return plain[:at] + b"".join(chunks) + plain[at:]


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    right = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", right if checksum is None else checksum)


def webp_with(*chunks: tuple[bytes, bytes], cut: int = 0) -> bytes:
    plain = encoded_as(picture(), "WEBP", lossless=True, exif=EXIF + b"II*\0")
    vp8l = plain.find(b"VP8L")
    size = int.from_bytes(plain[vp8l + 4 : vp8l + 8], "little")
    body = b"WEBP" + plain[12:30] + plain[vp8l : vp8l + 8 + size + size % 2]
    body += b"".join(k + struct.pack("<I", len(v)) + v + bytes(len(v) % 2) for k, v in chunks)
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    return data[: len(data) - cut] if cut else data


BOMB = zlib.compress(bytes(4_000_000), 9)
MPF = b"MPF\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 3, 0xB000, 7, 4) + b"0100"
MPF += struct.pack("<HHII", 0xB001, 4, 1, 9) + struct.pack("<HHII", 0xB002, 7, 144, 50) + bytes(4)

DAMAGED = {
    "orientation as text": jpeg_with((0xE1, tiff(0x112, 2, 2, b"6\0\0\0"))),
    "orientation as bytes": jpeg_with((0xE1, tiff(0x112, 7, 3, b"\6\0\0\0"))),
    "orientation 99": jpeg_with((0xE1, tiff(0x112, 3, 1, b"\x63\0\0\0"))),
    "orientation as a fraction": jpeg_with((0xE1, tiff(0x112, 5, 1, b"\x08\0\0\0"))),
    "Adobe that is short": jpeg_with((0xEE, b"Adobe")),
    "JFIF that is short": jpeg_with((0xE0, b"JFIF\0")),
    "text chunk that is a bomb": png_with(chunk(b"zTXt", b"a\0\0" + BOMB)),
    "several of them": png_with(*(chunk(b"zTXt", b"a%d\0\0" % i + BOMB) for i in range(8))),
    "bomb behind the pixels": png_with(chunk(b"zTXt", b"a\0\0" + BOMB), at_end=True),
    "international text that is a bomb": png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "wrong checksum of a text": png_with(chunk(b"tEXt", b"a\0b", 1)),
    "wrong checksum of the time": png_with(chunk(b"tIME", bytes(7), 2)),
    "wrong checksum of a profile": png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(b"no profile"), 3)),
    "wrong checksum of EXIF": png_with(chunk(b"eXIf", b"MM\0*", 4)),
    "orientation as text in a PNG": png_with(chunk(b"eXIf", tiff(0x112, 2, 2, b"6\0\0\0")[6:])),
    "resolution that is too short": png_with(chunk(b"pHYs", b"\0")),
    "gamma that is too short": png_with(chunk(b"gAMA", b"")),
    "animation without frames": png_with(chunk(b"acTL", b"\0")),
    "EXIF of WebP cut": webp_with((b"EXIF", bytes(64)), cut=40),
    "orientation as text in WebP": webp_with((b"EXIF", tiff(0x112, 2, 2, b"6\0\0\0")[6:])),
}
HARMLESS = {
    "EXIF of nothing": jpeg_with((0xE1, EXIF)),
    "EXIF of garbage": jpeg_with((0xE1, EXIF + bytes(range(200)))),
    "EXIF that points to itself": jpeg_with((0xE1, EXIF + b"II*\0\x08\0\0\0" + struct.pack("<HI", 0, 8))),
    "two EXIF headers": jpeg_with((0xE1, EXIF + EXIF + b"II*\0")),
    "orientation 0": jpeg_with((0xE1, tiff(0x112, 3, 1, bytes(4)))),
    "resolution 0": jpeg_with((0xE1, tiff(0x11A, 5, 1, bytes(4)))),
    "resolution of text": jpeg_with((0xE1, tiff(0x11A, 2, 4, b"abc\0"))),
    "JFIF resolution 65535": jpeg_with((0xE0, b"JFIF\0\1\2\1" + b"\xff" * 4 + bytes(2))),
    "profile in a part that is missing": jpeg_with((0xE2, b"ICC_PROFILE\0\2\x09garbage")),
    "profile without a number": jpeg_with((0xE2, b"ICC_PROFILE\0")),
    "XMP that is not XML": jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0<x <<< tiff:Orientation")),
    "Photoshop of garbage": jpeg_with((0xED, b"Photoshop 3.0\0" + b"8BIM\xff\xff\xff\xff\xff\xff")),
    "wrong MPO index": jpeg_with((0xE2, MPF)),
    "MPO index of nothing": jpeg_with((0xE2, b"MPF\0")),
    "comment of garbage": jpeg_with((0xFE, b"\xff" * 100)),
    "profile of garbage in a PNG": png_with(chunk(b"iCCP", b"a\0\0garbage")),
    "text without end": png_with(chunk(b"tEXt", b"\xff" * 100)),
    "resolution 0 in a PNG": png_with(chunk(b"pHYs", bytes(9))),
    "EXIF of garbage in WebP": webp_with((b"EXIF", b"garbage")),
    "XMP of garbage in WebP": webp_with((b"XMP ", b"\xff" * 31)),
}
PLAIN = {kind: decode_image(encoded_as(picture(), kind)) for kind in ("JPEG", "PNG")}
PLAIN["WEBP"] = PLAIN["PNG"]


def in_shards(data: bytes, tmp_path) -> object:
    path = tmp_path / "image"
    path.write_bytes(data)
    return check(record_of(path, len(data)), "test", Reencoding())


def record_of(path, size):
    return Record("a", "image", Stored(path, 0, size, "a.jpg"), ["a photo"])


@pytest.mark.parametrize("name", [*DAMAGED, *HARMLESS])
def test_the_pixels_are_those_without_metadata(name, tmp_path):
    data = (DAMAGED | HARMLESS)[name]
    kind = "JPEG" if data[:2] == b"\xff\xd8" else "PNG" if data[:4] == b"\x89PNG" else "WEBP"
    np.testing.assert_array_equal(decode_image(data), PLAIN[kind])
    assert decode_image(data, 1).shape[2] == 3
    found = in_shards(data, tmp_path)
    assert not isinstance(found, Rejected)
    assert (found.media, found.meta["width"], found.meta["height"]) == (data, 48, 32)
    if name in DAMAGED:
        assert found.notes == (DAMAGED_METADATA,)


def test_a_sound_orientation_beside_a_damaged_text_is_used():
    exif = Image.Exif()
    exif[0x112] = 6
    turned = encoded_as(picture(), "PNG", exif=exif)
    bomb = turned[:33] + chunk(b"zTXt", b"a\0\0" + BOMB) + turned[33:]
    np.testing.assert_array_equal(decode_image(bomb), np.rot90(PLAIN["PNG"], -1))
    read = read_image(bomb)
    assert (read.width, read.height, read.damaged_metadata) == (32, 48, True)


def test_pixels_that_are_damaged_are_still_refused(tmp_path):
    whole = encoded_as(picture(200, 200), "PNG")
    webp = encoded_as(picture(200, 200), "WEBP", exif=EXIF)
    bad = {
        "wrong checksum of the size": whole[:29] + bytes(4) + whole[33:],
        "cut PNG": whole[: len(whole) // 2],
        "cut JPEG": DAMAGED["orientation as text"][:-200],
        "cut WebP": webp[: len(webp) // 2],
    }
    for name, data in bad.items():
        assert isinstance(in_shards(data, tmp_path), Rejected), name


def test_a_conversion_says_what_it_ignored(shared_data, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(shared_data / "faults" / "exif_orientation_as_text", photos)
    for number, data in enumerate(DAMAGED.values()):
        (photos / f"made{number}.jpg").write_bytes(data)
        (photos / f"made{number}.txt").write_text("a photo")
    for workers in ("1", "2"):
        options = ["folder", "--media", str(photos), "--output", str(tmp_path / workers), "--samples-per-shard", "9"]
        assert main([*options, "--max-rejected", "0", "--workers", workers]) == 0
        out = capsys.readouterr().out
        count = len(DAMAGED) + 1
        assert f"wrote {len(DAMAGED) + 6} samples" in out and "rejected: none" in out
        assert f"notes: {count} {DAMAGED_METADATA}; listed in {tmp_path / workers / 'notes.jsonl'}" in out
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    turned = {
        s.meta["id"]: (s.meta["width"], s.meta["height"]) for s in iterate_samples(SourceConfig.at(tmp_path / "1"))
    }
    assert turned["double-header.jpg"] == (72, 96) and turned["orientation-string.jpg"] == (96, 72)


def test_mutated_metadata(tmp_path):
    """Whatever the bytes between the signature and the pixels are, there are pixels or a reason."""
    rng = np.random.default_rng(5)
    originals = list((DAMAGED | HARMLESS).values())
    kept = 0
    for number in range(300):
        original = originals[number % len(originals)]
        data = bytearray(original[: max(len(original), 2000)])
        pixels = max(original.find(mark) for mark in (b"\xff\xda", b"IDAT", b"VP8L"))
        for _ in range(int(rng.integers(1, 5))):
            place = int(rng.integers(4, max(5, min(pixels, 400))))
            data[place] = int(rng.choice([0, 1, 6, 127, 128, 255]))
        found = in_shards(bytes(data), tmp_path)
        kept += not isinstance(found, Rejected)
    assert kept > 60


def test_images_in_memory(tmp_path):
    from dsmoe_vl.inference.media import to_sample

    opened = Image.open(io.BytesIO(DAMAGED["orientation as text"]))
    np.testing.assert_array_equal(decode_image(to_sample(opened, "image").media), PLAIN["JPEG"])
