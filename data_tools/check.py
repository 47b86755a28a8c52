"""Checks whether a record can be trained on, and makes its sample: media, media type, clean captions, KEY.json."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data_tools.formats import Record
from data_tools.schema import curves_problem
from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.data.decode import MAX_PIXELS, decode_image, read_image
from dsmoe_vl.data.foreign_media import stored
from dsmoe_vl.data.media_kind import HEAD, media_kind
from dsmoe_vl.data.video_file import LEAST_SHARE, open_video
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

CHECKED_FRAMES = 16  # of a video are decoded to check it
QUALITY = 92  # of a JPEG that is scaled down, by default
# Notes on samples that are used.
DAMAGED_METADATA = "damaged metadata ignored"
TOO_LARGE = "larger than data.max_megapixels, by default not trained on: use --max-side"
DAMAGED_FRAMES = "damaged frames, replaced by the next ones that can be decoded"
CUT = f"cut short, but at least {LEAST_SHARE:.0%} is there".replace("%", " %")


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
    notes: tuple[str, ...] = ()  # what a user should know of it: "damaged metadata ignored"


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be trained on. `reason`: the kind of problem, `detail`: this one."""

    identifier: str
    reason: str
    detail: str


def check(record: Record, source: str, reencoding: Reencoding) -> Checked | Rejected:
    """Read and decode the media of a record as training will, and clean its captions."""
    if record.problem:
        return _rejected(record, record.problem)
    captions = [" ".join(caption.split()) for caption in record.captions if isinstance(caption, str)]
    captions = [caption for caption in captions if caption]
    if not tasks_of(record, captions):
        return Rejected(record.identifier, "empty caption", f"{len(record.captions)} captions, none with text")
    if problem := curves_problem(record.meta):
        return _rejected(record, problem)
    if record.media is None:
        return Rejected(record.identifier, "unlisted file", "the annotations caption it but name no file")
    try:
        media = require_regular(record.media) if isinstance(record.media, Path) else record.media
        data = media.read_bytes()
    except FileNotFoundError:
        return Rejected(record.identifier, "missing file", str(record.media))
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        return Rejected(record.identifier, "unreadable file", f"{record.media}: {error}")
    except DataError as error:  # of what is made of a file
        return Rejected(record.identifier, f"unreadable {record.kind}", f"{record.media}: {error}")
    kind = media_kind(data[:HEAD]) or record.kind
    notes: tuple[str, ...] = ()
    if kind != record.kind:
        record = replace(record, kind=kind)
        notes = (f"{kind} by its content, not by its name or dataset",)
    tasks = tasks_of(record, captions)
    if not tasks:
        return Rejected(record.identifier, "no task", f"the annotations of {record.media} do not fit an {kind}")
    try:
        data, media_type, facts, more = (image_facts if kind == "image" else video_facts)(data, reencoding)
    except DataError as error:
        return Rejected(record.identifier, f"unreadable {kind}", f"{record.media}: {error}")
    own = {"source": source, "id": record.identifier, "captions": captions or None}
    meta = {"tasks": tasks, **record.meta, **facts, **own}
    text = captions[0] if captions else str(record.meta.get("summary") or "")
    return Checked(record.identifier, data, media_type, text, meta, notes + more)


def tasks_of(record: Record, captions: list[str]) -> list[str]:
    """The tasks that a record with these clean captions can be used for."""
    return [spec.name for spec in TASKS if spec.qualifies(record.kind, captions, record.meta)]


# The bytes to store, their extension by content, what is known of them for KEY.json, and notes.
Facts = tuple[bytes, str, dict[str, Any], tuple[str, ...]]


def image_facts(data: bytes, reencoding: Reencoding) -> Facts:
    """With width and height of the upright picture. Raises DataError if the image cannot be decoded."""
    data, media_type, note = stored(data)
    # At an eighth of its sides a JPEG is still read to its end, in half the time.
    read = read_image(data, enough_pixels=1)
    width, height = read.width, read.height
    is_larger = 0 < reencoding.max_side < max(width, height)
    if is_larger or reencoding.quality:
        picture = Image.fromarray(decode_image(data))
        if is_larger:
            side = reencoding.max_side
            picture = ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=reencoding.quality or QUALITY)
        data, media_type, (width, height) = file.getvalue(), "jpg", picture.size
    notes = {note: bool(note), DAMAGED_METADATA: read.damaged_metadata}
    notes[TOO_LARGE] = width * height > DataConfig().max_megapixels * 1e6
    return data, media_type, {"width": width, "height": height}, _true(notes)


def video_facts(data: bytes, _: Reencoding) -> Facts:
    """With width, height, fps and duration_seconds. Raises DataError if no frame can be decoded.

    The times come from the packets, because several containers have no frame count and duration in their headers.
    """
    data, media_type, note = stored(data)
    with open_video(data, MAX_PIXELS) as video:
        frames = list(video.frames(CHECKED_FRAMES, "uniform", 1.0))
        times = video.times()
        rate = float(video.stream.average_rate or 0)
        notes = {note: bool(note), CUT: video.is_cut, DAMAGED_FRAMES: video.damaged > 0}
    height, width = frames[0][1].shape[:2]
    span = times[-1] - times[0]
    rate = rate or ((len(times) - 1) / span if span else 0.0)
    facts = {
        "width": width,
        "height": height,
        "fps": round(rate, 3) or None,
        "duration_seconds": round(span + 1 / rate, 3) if rate else None,
    }
    return data, media_type, facts, _true(notes)


def _true(notes: dict[str, bool]) -> tuple[str, ...]:
    return tuple(note for note, is_so in notes.items() if is_so)


def _rejected(record: Record, problem: str) -> Rejected:
    """`problem`: `reason: detail`."""
    reason, _, detail = problem.partition(":")
    return Rejected(record.identifier, reason, detail.strip())
