"""Checks whether a record can be trained on, and makes its sample: media, media type, clean captions, KEY.json."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageOps

from data_tools.formats import Record
from data_tools.schema import curves_problem
from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.data.sample import VIDEO_EXTENSIONS
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

IMAGE_TYPES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's format -> extension
ORIENTATION_TAG = 0x0112  # of EXIF; with 5 and above the picture lies on its side
CHECKED_FRAMES = 16  # of a video are decoded to check it
QUALITY = 92  # of a JPEG that is scaled down, by default


@dataclass(frozen=True)
class Reencoding:
    """How images are re-encoded. By default they keep their bytes; videos always do."""

    max_side: int = 0  # pixels; larger images are scaled down; 0: no limit
    quality: int = 0  # every image becomes a JPEG of this quality; 0: only scaled ones, of QUALITY

    def __post_init__(self) -> None:
        if self.max_side < 0:
            raise DataError(f"--max-side {self.max_side}: give pixels, or leave it out to keep the original bytes")
        if not 0 <= self.quality <= 100:
            raise DataError(f"--quality {self.quality}: give 1 to 100, or leave it out to keep the original bytes")


@dataclass(frozen=True)
class Checked:
    """A record that can be trained on."""

    identifier: str
    media: bytes
    media_type: str  # extension without a dot, by content
    text: str  # the first caption; without captions, the summary
    meta: dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be trained on. `reason`: the kind of problem, `detail`: this one."""

    identifier: str
    reason: str
    detail: str


def check(record: Record, source: str, reencoding: Reencoding) -> Checked | Rejected:
    """Read and decode the media of a record as training will, and clean its captions."""
    if record.problem:
        reason, _, detail = record.problem.partition(":")
        return Rejected(record.identifier, reason, detail.strip())
    captions = [" ".join(caption.split()) for caption in record.captions if isinstance(caption, str)]
    captions = [caption for caption in captions if caption]
    tasks = tasks_of(record, captions)
    if not tasks:
        return Rejected(record.identifier, "empty caption", f"{len(record.captions)} captions, none with text")
    if problem := curves_problem(record.meta):
        reason, _, detail = problem.partition(": ")
        return Rejected(record.identifier, reason, detail)
    if record.media is None:
        return Rejected(record.identifier, "unlisted file", "the annotations caption it but name no file")
    try:
        media = require_regular(record.media) if isinstance(record.media, Path) else record.media
        data = media.read_bytes()
    except FileNotFoundError:
        return Rejected(record.identifier, "missing file", str(record.media))
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        return Rejected(record.identifier, "unreadable file", f"{record.media}: {error}")
    try:
        if record.kind == "image":
            data, media_type, facts = image_facts(data, reencoding)
        else:
            media_type, facts = video_facts(data, record.media.suffix)
    except DataError as error:
        return Rejected(record.identifier, f"unreadable {record.kind}", f"{record.media}: {error}")
    own = {"source": source, "id": record.identifier, "captions": captions or None}
    meta = {"tasks": tasks, **record.meta, **facts, **own}
    text = captions[0] if captions else str(record.meta.get("summary") or "")
    return Checked(record.identifier, data, media_type, text, meta)


def tasks_of(record: Record, captions: list[str]) -> list[str]:
    """The tasks that a record with these clean captions can be used for."""
    return [spec.name for spec in TASKS if spec.qualifies(record.kind, captions, record.meta)]


def image_facts(data: bytes, reencoding: Reencoding) -> tuple[bytes, str, dict[str, Any]]:
    """The bytes to store, their extension by content, and width and height of the upright picture.

    Raises DataError if the image cannot be decoded.
    """
    # At an eighth of its sides a JPEG is still read to its end, in half the time.
    decode_image(data, enough_pixels=1)
    with Image.open(io.BytesIO(data)) as opened:
        media_type = IMAGE_TYPES[opened.format or ""]
        is_turned = opened.getexif().get(ORIENTATION_TAG, 1) >= 5
        width, height = opened.size[::-1] if is_turned else opened.size
    is_larger = 0 < reencoding.max_side < max(width, height)
    if is_larger or reencoding.quality:
        picture = Image.fromarray(decode_image(data))
        if is_larger:
            side = reencoding.max_side
            picture = ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=reencoding.quality or QUALITY)
        data, media_type, (width, height) = file.getvalue(), "jpg", picture.size
    return data, media_type, {"width": width, "height": height}


def video_facts(data: bytes, suffix: str) -> tuple[str, dict[str, Any]]:
    """Extension, width, height, fps and duration_seconds. Raises DataError if frames cannot be decoded.

    The times come from the packets, because several containers have no frame count and duration in their headers.
    """
    media_type = suffix.lower().removeprefix(".")
    if media_type not in VIDEO_EXTENSIONS:
        raise DataError(f"a {suffix or 'nameless'} file; only {', '.join(VIDEO_EXTENSIONS)} are supported")
    height, width = decode_video(data, CHECKED_FRAMES)[0][1].shape[:2]
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        tick_seconds = float(stream.time_base or 0)
        times = sorted(
            ticks * tick_seconds
            for packet in container.demux(stream)
            if packet.size and (ticks := packet.dts if packet.pts is None else packet.pts) is not None
        )
        rate = float(stream.average_rate or 0)
    span = times[-1] - times[0]
    rate = rate or ((len(times) - 1) / span if span else 0.0)
    facts = {
        "width": width,
        "height": height,
        "fps": round(rate, 3) or None,
        "duration_seconds": round(span + 1 / rate, 3) if rate else None,
    }
    return media_type, facts
