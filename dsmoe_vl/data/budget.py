"""The recipe's limits on the size of a sample, checked before bytes are read and before they are decoded."""

from __future__ import annotations

import io

import simplejpeg
from PIL import Image

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.sample import TEXT_EXTENSIONS
from dsmoe_vl.data.video_file import frame_size
from dsmoe_vl.errors import DataError

_PNG = b"\x89PNG\r\n\x1a\n"
_FIX = "raise it in the recipe if the sample is right"


def check_bytes(name: str, extension: str, size: int, data: DataConfig) -> None:
    """Raise DataError if `size`, the bytes of a sample's file, is above `data.max_text_mib` or `data.max_media_mib`."""
    setting = "max_text_mib" if extension in TEXT_EXTENSIONS else "max_media_mib"
    limit: float = getattr(data, setting)
    if size > limit * 2**20:
        raise DataError(f"file too large: {name}: {size} bytes, more than data.{setting} = {limit:g} (MiB); {_FIX}")


def check_pixels(name: str, media: bytes, data: DataConfig) -> None:
    """Raise DataError if an image, or a frame of a video, has more than `data.max_megapixels`, by its header.

    A header that cannot be read is left to the decoder, which has a limit of its own.
    """
    try:
        width, height = _size(media)
    except Exception:  # decoders raise anything for malformed bytes
        return
    if width * height > data.max_megapixels * 1e6:
        limit = f"{width} x {height} pixels, more than data.max_megapixels = {data.max_megapixels:g}"
        raise DataError(f"picture too large: {name}: {limit}; {_FIX}")


def _size(media: bytes) -> tuple[int, int]:
    """Width and height of an image or a frame. Raises any exception if they are unknown."""
    if media.startswith(b"\xff\xd8"):
        height, width, *_ = simplejpeg.decode_jpeg_header(media)
        return width, height
    if media.startswith(_PNG):  # Pillow would warn of a large one
        return int.from_bytes(media[16:20]), int.from_bytes(media[20:24])
    if media[8:12] == b"WEBP":
        return Image.open(io.BytesIO(media), formats=("WEBP",)).size
    return frame_size(media)
