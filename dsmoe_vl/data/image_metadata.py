"""Metadata of images: the orientation is used, everything else is not, and damage in it costs no pixels."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from zlib import crc32

import numpy as np
from PIL import Image

# Pillow warns of damaged metadata, which cost no pixels. Not in a `with` block: several threads read images.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_ORIENTATION_TAG = 0x0112
# How to turn a picture upright, by its EXIF orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}
# Application data of JPEGs that say how colours are stored, JFIF and Adobe, and their least size.
_JPEG_COLOURS = {0xE0: 18, 0xEE: 16}
_START_OF_SCAN = 0xDA
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # chunks without which the pixels would be others
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_METADATA_FLAGS = 0x2C  # of VP8X: it is followed by a colour profile, EXIF, XMP


def orientation(image: Image.Image) -> tuple[int, bool]:
    """The orientation of an image, from 1 (upright) to 8, and whether its metadata are damaged: then it is 1."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow raises anything for malformed metadata
        return 1, True
    is_known = isinstance(value, int) and value in _UPRIGHT
    return (value, False) if is_known else (1, value != 0)  # 0: not set, by the standard


def is_on_its_side(orientation: int) -> bool:
    """Whether turning upright exchanges width and height."""
    return orientation >= 5


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels [h, w, 3] upright."""
    return _UPRIGHT[orientation](pixels)


def has_no_metadata(data: bytes) -> bool:
    """Whether these are the bytes of a JPEG without application data before its picture, but for how colours are
    stored."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == _START_OF_SCAN:
            return True
        if 0xE0 <= marker <= 0xEF and size < _JPEG_COLOURS.get(marker, len(data)):
            return False
        at += size
    return False


def without_metadata(data: bytes) -> Iterator[bytes]:
    """A JPEG or PNG without what is not needed for its pixels, first with its EXIF, then without; a WebP without."""
    for signature, strip in ((b"\xff\xd8\xff", _bare_jpeg), (_PNG_SIGNATURE, _bare_png), (b"RIFF", _bare_webp)):
        if data.startswith(signature):
            yield from (strip(data, True), strip(data, False))


def _bare_jpeg(data: bytes, with_exif: bool) -> bytes:
    kept, at = [data[:2]], 2
    while at + 4 <= len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):  # the segment before stated a wrong length
            found = _JPEG_MARKER.search(data, at)
            if found is None:
                break
            at = found.start()
            continue
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _START_OF_SCAN:
            return b"".join([*kept, data[at:]])
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or (
            (marker == 0xE1 and with_exif and data[at + 4 : at + 8] == b"Exif")
            or end - at >= _JPEG_COLOURS.get(marker, len(data))
        ):
            kept.append(data[at:end])
        at = end
    return data


def _bare_png(data: bytes, with_exif: bool) -> bytes:
    kept, at = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 4 : end - 4]
        is_ancillary, is_whole = bool(kind[0] & 0x20), crc32(body) == int.from_bytes(data[end - 4 : end], "big")
        wanted = kind in _PNG_PIXELS or (kind == b"eXIf" and with_exif)
        if wanted and (is_whole or not is_ancillary):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _bare_webp(data: bytes, _: bool) -> bytes:
    kept, at = [b"WEBP"], 12
    while at + 8 <= len(data):
        kind, end = data[at : at + 4], at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in _WEBP_PIXELS and end > len(data):
            return data
        chunk = data[at : end + end % 2]
        if kind == b"VP8X" and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~_WEBP_METADATA_FLAGS]) + chunk[9:]
        if kind in _WEBP_PIXELS:
            kept.append(chunk)
        at = end + end % 2
    body = b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body
