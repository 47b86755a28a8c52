"""Checks whether a record can be trained on, and makes its sample: media, recording, clean captions, KEY.json."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data_tools.formats import Record, Rendered, Stored
from data_tools.recordings import recording_facts
from data_tools.schema import curves_problem
from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.data.budget import check_bytes
from dsmoe_vl.data.contents import text_of
from dsmoe_vl.data.decode import MAX_PIXELS, decode_image, read_image
from dsmoe_vl.data.foreign_media import stored
from dsmoe_vl.data.media_kind import HEAD, media_kind
from dsmoe_vl.data.sample import TEXT_EXTENSIONS
from dsmoe_vl.data.video_file import LEAST_SHARE, open_video
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

CHECKED_FRAMES = 16  # of a video are decoded to check it
_ODD_RATE = 5  # times the measured frames per second: a stated rate that is not believed
QUALITY = 92  # of a JPEG that is scaled down, by default
# Notes on samples that are used.
DAMAGED_METADATA = "damaged metadata ignored"
TOO_LARGE = "larger than data.max_megapixels, by default not trained on: use --max-side"
TOO_MANY_BYTES = (
    "file larger than data.max_media_mib, by default not trained on: make it smaller, or raise the limit in the recipe",
    "texts larger than data.max_text_mib, by default not trained on: shorten them, or raise the limit in the recipe",
)
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
    media: bytes | None
    media_type: str  # extension without a dot, by content; "" without media
    text: str  # the first caption; without captions, the summary or the transcript
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()  # what a user should know of it: "damaged metadata ignored"
    recording: bytes | None = None  # of speech
    recording_type: str = ""


@dataclass(frozen=True)
class Rejected:
    """A record that cannot be trained on. `reason`: the kind of problem, `detail`: this one."""

    identifier: str
    reason: str
    detail: str


def check(record: Record, source: str, reencoding: Reencoding) -> Checked | Rejected:
    """Read and decode the media and the recording of a record as training will, and clean its texts."""
    try:
        return _checked(record, source, reencoding)
    except _Unusable as why:
        return Rejected(record.identifier, why.reason, why.detail)


def _checked(record: Record, source: str, reencoding: Reencoding) -> Checked:
    """Raises _Unusable."""
    if record.problem:
        raise _Unusable.of(record.problem)
    captions = [_clean(caption) for caption in record.captions if isinstance(caption, str)]
    captions = [caption for caption in captions if caption]
    for name, clean in (("transcript", _clean), ("summary", text_of)):
        if isinstance(text := record.meta.get(name), str):
            record = replace(record, meta={**record.meta, name: clean(text) or None})
    if not tasks_of(record, captions):
        raise _without_text(record, captions)
    if problem := curves_problem(record.meta):
        raise _Unusable.of(problem)
    if record.media is None and record.recording is None:
        raise _Unusable("unlisted file", "the annotations caption it but name no file")
    media, media_type, recording, recording_type = None, "", None, ""
    facts: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if record.media is not None:
        data = _read(record.media, record.kind)
        kind = media_kind(data[:HEAD]) or record.kind
        other_kind: tuple[str, ...] = ()
        if kind != record.kind:
            record = replace(record, kind=kind)
            other_kind = (f"{kind} by its content, not by its name or dataset",)
            if not tasks_of(record, captions):
                raise _Unusable("no task", f"the annotations of {record.media} do not fit an {kind}")
        try:
            media, media_type, facts, notes = (image_facts if kind == "image" else video_facts)(data, reencoding)
        except DataError as error:
            raise _Unusable(f"unreadable {kind}", f"{record.media}: {error}") from error
        notes = other_kind + notes
    if record.recording is not None:
        recording = _read(record.recording, "recording")
        try:
            recording_type, of_speech, more = recording_facts(recording)
        except DataError as error:
            raise _Unusable("unreadable recording", f"{record.recording}: {error}") from error
        facts, notes = {**facts, **of_speech}, notes + more
    own = {"source": source, "id": record.identifier, "captions": captions or None}
    meta = {"tasks": tasks_of(record, captions), **record.meta, **facts, **own}
    text = captions[0] if captions else str(record.meta.get("summary") or record.meta.get("transcript") or "")
    return Checked(record.identifier, media, media_type, text, meta, notes, recording, recording_type)


def tasks_of(record: Record, captions: list[str]) -> list[str]:
    """The tasks that a record with these clean captions can be used for."""
    return [spec.name for spec in TASKS if spec.qualifies(record.has, captions, record.meta)]


class _Unusable(Exception):
    """Why a record is rejected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    @classmethod
    def of(cls, problem: str) -> _Unusable:
        """`problem`: `reason: detail`."""
        reason, _, detail = problem.partition(":")
        return cls(reason, detail.strip())


def _without_text(record: Record, captions: list[str]) -> _Unusable:
    if record.media is None and record.recording is not None and captions:
        return _Unusable("no transcript", f"{len(captions)} captions of a recording alone, which needs one text")
    return _Unusable("empty caption", f"{len(record.captions)} captions, none with text")


def _read(file: Path | Stored | Rendered, kind: str) -> bytes:
    """Raises _Unusable."""
    try:
        return (require_regular(file) if isinstance(file, Path) else file).read_bytes()
    except FileNotFoundError as error:
        raise _Unusable("missing file", str(file)) from error
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        raise _Unusable("unreadable file", f"{file}: {error}") from error
    except DataError as error:  # of what is made of a file
        raise _Unusable(f"unreadable {kind}", f"{file}: {error}") from error


def _clean(text: str) -> str:
    """A text in one line, "" if training would take it for none."""
    return " ".join(text_of(text).split())


# The bytes to store, their extension by content, what is known of them for KEY.json, and notes.
Facts = tuple[bytes, str, dict[str, Any], tuple[str, ...]]


def image_facts(data: bytes, reencoding: Reencoding) -> Facts:
    """With width and height of the upright picture. Raises DataError if the image cannot be decoded."""
    data, media_type, note, damaged_metadata = stored(data)
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
    notes = {note: bool(note), DAMAGED_METADATA: damaged_metadata or read.damaged_metadata}
    notes[TOO_LARGE] = width * height > DataConfig().max_megapixels * 1e6
    return data, media_type, {"width": width, "height": height}, _true(notes)


def video_facts(data: bytes, _: Reencoding) -> Facts:
    """With width, height, fps and duration_seconds. Raises DataError if no frame can be decoded.

    The times come from the packets, because several containers have no frame count and duration in their headers.
    """
    made = stored(data)
    with open_video(made.data, MAX_PIXELS) as video:
        frames = list(video.frames(CHECKED_FRAMES, "uniform", 1.0))
        times = video.times()
        stated = float(video.stream.average_rate or 0)
        notes = {made.note: bool(made.note), CUT: video.is_cut, DAMAGED_FRAMES: video.damaged > 0}
    height, width = frames[0][1].shape[:2]
    span = times[-1] - times[0]
    measured = (len(times) - 1) / span if span else 0.0
    # An AVI with times in milliseconds states a rate of 1000.
    rate = stated if stated and (not measured or stated < _ODD_RATE * measured) else measured
    facts = {
        "width": width,
        "height": height,
        "fps": round(rate, 3) or None,
        "duration_seconds": round(span + 1 / rate, 3) if rate else None,
    }
    return made.data, made.extension, facts, _true(notes)


def size_notes(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Notes on a sample whose files training refuses by default, from their bytes by extension."""
    refused = []
    for extension, size in sizes.items():
        try:
            check_bytes("", extension, size, DataConfig())
        except DataError:
            refused.append(TOO_MANY_BYTES[extension in TEXT_EXTENSIONS])
    return tuple(dict.fromkeys(refused))


def _true(notes: dict[str, bool]) -> tuple[str, ...]:
    return tuple(note for note, is_so in notes.items() if is_so)
