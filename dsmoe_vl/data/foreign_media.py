"""Images and videos in formats that shards do not have, brought into one that they have."""

from __future__ import annotations

import io
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from dsmoe_vl.data.decode import check_pixels, to_rgb
from dsmoe_vl.data.image_metadata import orientation, upright
from dsmoe_vl.data.media_kind import HEAD, container, image_format, stored_extension
from dsmoe_vl.data.video_file import real_stream
from dsmoe_vl.errors import DataError

_IMAGES = ("GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_CONTAINERS = {"mpegts": "MPEG-TS", "mpeg": "MPEG-PS", "flv": "FLV", "asf": "ASF"}
_SUBFILE_TYPE, _IS_REDUCED, _DNG_VERSION = 254, 1, 50706  # TIFF tags that raw photos have beside a small preview


class Stored(NamedTuple):
    """Bytes that a shard may have. `note`: how they were made, "" if they are the given ones."""

    data: bytes
    extension: str  # by content, without a dot; "" if the content is neither an image nor a video
    note: str = ""


def stored(data: bytes) -> Stored:
    """Bring an image or a video into a format that shards have, without a loss.

    JPEG, PNG, WebP, MP4 (also as .mov, .m4v, .3gp), WebM, Matroska and AVI keep their bytes. Other images become a PNG
    of the pixels that training would see: 8 bits, upright, transparent parts in white; of an animation the first
    picture, as it is for animated PNG and WebP. The video stream of other containers is copied to Matroska.

    Raises DataError if that is not possible.
    """
    head = data[:HEAD]
    extension = stored_extension(head)
    if extension:
        return Stored(data, extension)
    if name := image_format(head):
        return _as_png(data, name)
    if name := container(head):
        return Stored(_remuxed(data, name), "mkv", f"{_CONTAINERS[name]} stored as Matroska")
    return Stored(data, "")


def _as_png(data: bytes, name: str) -> Stored:
    if name not in _IMAGES:
        raise DataError(f"image cannot be decoded: {name} is not supported; save it as a JPEG")
    try:
        with Image.open(io.BytesIO(data), formats=[name]) as image:
            check_pixels(*image.size)
            if name == "TIFF":
                _check_is_no_preview(image)
            count = getattr(image, "n_frames", 1)
            image.seek(0)
            image.load()
            pixels = upright(np.asarray(to_rgb(image)), orientation(image)[0])
    except DataError:
        raise
    except Exception as error:  # decoders raise anything for malformed bytes
        raise DataError(f"image cannot be decoded: {error}") from error
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    several = "first of several pictures in a " if count > 1 else ""
    return Stored(file.getvalue(), "png", f"{several}{name} stored as PNG")


def _check_is_no_preview(image: Image.Image) -> None:
    tags = getattr(image, "tag_v2", {})
    if _DNG_VERSION in tags or tags.get(_SUBFILE_TYPE) == _IS_REDUCED:
        raise DataError("image cannot be decoded: a raw photo is not supported; save it as a JPEG")


def _remuxed(data: bytes, name: str) -> bytes:
    file = io.BytesIO()
    try:
        with (
            av.open(io.BytesIO(data), "r", format=name) as source,
            # Without this, the file has a random number and the time.
            av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as target,
        ):
            stream = real_stream(source)
            copy = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size and (packet.dts is not None or packet.pts is not None):
                    packet.stream = copy
                    target.mux(packet)
    except DataError:
        raise
    except Exception as error:  # FFmpeg raises anything for malformed bytes
        raise DataError(f"video cannot be decoded: {error}") from error
    return file.getvalue()
