"""Images and videos in formats that shards do not have, brought into one that they have."""

from __future__ import annotations

import io
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from dsmoe_vl.data.container_file import reading
from dsmoe_vl.data.decode import check_pixels, to_rgb
from dsmoe_vl.data.image_metadata import orientation, upright
from dsmoe_vl.data.media_kind import HEAD, container, image_format, stored_extension
from dsmoe_vl.data.video_file import real_stream
from dsmoe_vl.errors import DataError

_IMAGES = ("GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_CONTAINERS = {"mpegts": "MPEG-TS", "mpeg": "MPEG-PS", "flv": "FLV", "asf": "ASF"}
# TIFF tags that raw photos have beside a small preview; a picture that is reduced and alone is an ordinary one.
_SUBFILE_TYPE, _IS_REDUCED, _SUBFILES, _DNG_VERSION = 254, 1, 330, 50706
_CR2 = b"CR"  # at byte 8 of a raw photo of Canon
_RAW = "a raw photo is not supported; save it as a JPEG"


class Stored(NamedTuple):
    """Bytes that a shard may have. `note`: how they were made, "" if they are the given ones. `damaged_metadata`: some
    were ignored then."""

    data: bytes
    extension: str  # by content, without a dot; "" if the content is neither an image nor a video
    note: str = ""
    damaged_metadata: bool = False


def stored(data: bytes) -> Stored:
    """Bring an image or a video into a format that shards have, without a loss.

    JPEG, PNG, WebP, MP4 (also as .mov, .m4v, .3gp), WebM, Matroska and AVI keep their bytes. Other images become a PNG
    of the pixels that training would see: 8 bits, upright, transparent parts in white; of an animation the first
    picture, as it is for animated PNG and WebP. The video stream of other containers is copied to Matroska or AVI.

    Raises DataError if that is not possible.
    """
    head = data[:HEAD]
    extension = stored_extension(head)
    if extension:
        return Stored(data, extension)
    if name := image_format(head):
        return _as_png(data, name)
    if name := container(head):
        return _remuxed(data, name)
    return Stored(data, "")


def _as_png(data: bytes, name: str) -> Stored:
    if name not in _IMAGES:
        raise DataError(f"image cannot be decoded: {name} is not supported; save it as a JPEG")
    if name == "TIFF" and data[8:10] == _CR2:
        raise DataError(f"image cannot be decoded: {_RAW}")
    try:
        with Image.open(io.BytesIO(data), formats=[name]) as image:
            check_pixels(*image.size)
            if name == "TIFF":
                _check_is_no_preview(image)
            count = getattr(image, "n_frames", 1)
            image.seek(0)
            image.load()
            turned, is_damaged = orientation(image)
            pixels = upright(np.asarray(to_rgb(image)), turned)
    except DataError:
        raise
    except UnidentifiedImageError:  # its message is the address of a buffer
        reason = f"it begins as a {name}, but is no whole one; copy it again, or save it as a JPEG"
        raise DataError(f"image cannot be decoded: {reason}") from None
    except Exception as error:  # decoders raise anything for malformed bytes
        raise DataError(f"image cannot be decoded: {error}") from error
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    several = "first of several pictures in a " if count > 1 else ""
    return Stored(file.getvalue(), "png", f"{several}{name} stored as PNG", is_damaged)


def _check_is_no_preview(image: Image.Image) -> None:
    """Raise DataError if the first picture is a small one of another in the file."""
    tags = getattr(image, "tag_v2", {})
    if _DNG_VERSION in tags or (tags.get(_SUBFILE_TYPE) == _IS_REDUCED and _SUBFILES in tags):
        raise DataError(f"image cannot be decoded: {_RAW}")


def _remuxed(data: bytes, name: str) -> Stored:
    """The video stream in Matroska; in AVI if Matroska has no place for its codec (FLV1, WMV1, WMV2)."""
    with reading(data, name, "video") as source:
        stream = real_stream(source)
        form = "matroska" if _can_have("matroska", stream) else "avi"
        file = io.BytesIO()
        # Without this, the file has a random number and the time.
        with av.open(file, "w", format=form, options={"fflags": "+bitexact"}) as target:
            copy = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size and (packet.dts is not None or packet.pts is not None):
                    packet.stream = copy
                    target.mux(packet)
    title, extension = {"matroska": ("Matroska", "mkv"), "avi": ("AVI", "avi")}[form]
    return Stored(file.getvalue(), extension, f"{_CONTAINERS[name]} stored as {title}")


def _can_have(form: str, stream: av.VideoStream) -> bool:
    """Whether a container can have the codec of a stream."""
    try:
        with av.open(io.BytesIO(), "w", format=form) as target:
            target.add_stream_from_template(stream)
    except ValueError:
        return False
    return True
