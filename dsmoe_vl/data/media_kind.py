"""What a file is, by its first bytes. Its name is a first guess at most."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dsmoe_vl.data.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from dsmoe_vl.files import require_regular

Kind = Literal["image", "video"]

HEAD = 4096  # bytes that are enough to recognize a file
NO_MEDIA = "neither an image nor a video"
TEXT_EXTENSION = "txt"  # of captions; never of media

_IMAGES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
}
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # their sizes; "BM" alone also begins texts
_ISO_IMAGES = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
_ISO_SOUND = (b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ")
_ASF = bytes.fromhex("3026b2758e66cf11")
_ASF_VIDEO = bytes.fromhex("c0ef19bc4d5bcf11a8fd00805f5c442b")  # a stream of this type is in the header
_TS_PACKET = 188  # bytes; each begins with 0x47


def media_kind(head: bytes) -> Kind | None:
    """Whether a file with these first bytes (HEAD are enough) is an image or a video; None: neither.

    The one place that decides by content. How both become a format of shards is in `foreign_media.py`.
    """
    return "image" if image_format(head) else "video" if container(head) else None


def kind_of_file(path: Path) -> Kind | None:
    """The kind of a file before it is read: by its name, if that is usual, else by its first bytes.

    A file that cannot be read has the kind "image", so that it is reported and not passed over.
    """
    extension = _extension(path)
    if extension in IMAGE_EXTENSIONS:
        return "image"
    if extension in VIDEO_EXTENSIONS:
        return "video"
    if extension == TEXT_EXTENSION:
        return None
    try:
        with require_regular(path).open("rb") as file:
            return media_kind(file.read(HEAD))
    except (OSError, ValueError):  # ValueError: an impossible file name
        return "image"


def has_usual_name(path: Path) -> bool:
    """Whether the extension is one that media have in shards, so that the file is certainly meant to be used."""
    return _extension(path) in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS


def image_format(head: bytes) -> str | None:
    """Pillow's name of an image's format; "HEIC", which Pillow cannot read; None if it is not an image."""
    for signature, name in _IMAGES.items():
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and head[14:18] in [size.to_bytes(4, "little") for size in _BMP_HEADERS]:
        return "BMP"
    if head[4:8] == b"ftyp":
        brands = _brands(head)
        if brands[0] in _ISO_IMAGES:
            return "AVIF" if b"avif" in brands or b"avis" in brands else _ISO_IMAGES[brands[0]]
    return None


def container(head: bytes) -> str | None:
    """FFmpeg's name of a video's container; None if it is not a video.

    FFmpeg must not guess: it would open a playlist, which can name local files.
    """
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        brand = _brands(head)[0] if head[4:8] == b"ftyp" else b""
        return None if brand in _ISO_SOUND or brand in _ISO_IMAGES else "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:1] == head[_TS_PACKET : _TS_PACKET + 1] == head[2 * _TS_PACKET : 2 * _TS_PACKET + 1] == b"G":
        return "mpegts"
    if head[:4] == b"\0\0\x01\xba":
        return "mpeg"
    if head[:4] == b"FLV\x01":
        return "flv"
    if head[:8] == _ASF and _ASF_VIDEO in head:
        return "asf"
    return None


def stored_extension(head: bytes) -> str:
    """The extension in a shard of bytes that are kept there; "" for formats that shards do not have."""
    extensions = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "mov": "mp4", "matroska": "mkv", "avi": "avi"}
    extension = extensions.get(image_format(head) or container(head) or "", "")
    return "webm" if extension == "mkv" and b"\x42\x82\x84webm" in head[:64] else extension  # EBML's DocType


def _brands(head: bytes) -> list[bytes]:
    """The major and the compatible brands of an ISO file, which begins with a box `ftyp`."""
    end = min(int.from_bytes(head[:4], "big"), HEAD)
    return [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]


def _extension(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")
