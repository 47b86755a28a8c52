"""Converts a user's pictures, videos and recordings (files, folders, shards, arrays) to the samples that tasks read."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.console import tell
from dsmoe_vl.data.contents import media_of
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.data.folder_walk import described, files_below
from dsmoe_vl.data.foreign_media import stored
from dsmoe_vl.data.media_kind import HEAD, NO_MEDIA, kind_of_file, media_kind
from dsmoe_vl.data.sample import IMAGE_EXTENSIONS, SPEECH_EXTENSIONS, VIDEO_EXTENSIONS, Sample
from dsmoe_vl.data.shards.download import is_remote
from dsmoe_vl.data.shards.index import INDEX_NAME, ShardIndex, read_sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

BATCH = 16  # media per forward

T = TypeVar("T")
# Called for each picture or video that cannot be used, with its name and the reason.
Failed = Callable[[str, str], None]


class Media(NamedTuple):
    """One picture or video: a file, or a sample in a shard.

    `place` identifies it, the same on every call; `size_bytes` and `mtime_ns` are the file's or the shard's (0: remote,
    or not read). `read` raises DataError; its sample's key is the name to show.
    """

    place: str
    size_bytes: int
    mtime_ns: int
    read: Callable[[], Sample]


def recorded(recording: Any) -> Sample:
    """A user's own recording as a sample: a path or encoded bytes, FLAC, WAV, MP3 or Opus. Raises DataError."""
    name = ""
    if isinstance(recording, (str, os.PathLike)):
        name = str(recording)
        try:
            recording = require_regular(Path(recording)).read_bytes()
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}; name an existing file") from None
    if not isinstance(recording, (bytes, bytearray, memoryview)):
        raise DataError(f"a recording cannot be made from {type(recording).__name__}: give a path or encoded bytes")
    encoded = bytes(recording)
    return Sample(name, SourceConfig(), 0, None, "", "", {}, recording=encoded, recording_type=SPEECH_EXTENSIONS[0])


def media_files(paths: Sequence[Path], kind: str) -> list[Media]:
    """Files of one `kind`, "image", "video" or "speech", whatever their names."""
    read = {kind: partial(read_file, kind=kind) for kind in ("image", "video")} | {"speech": recorded}
    return [Media(str(path), 0, 0, partial(read[kind], path)) for path in paths]


def open_media(folder: str, data: DataConfig) -> list[Media]:
    """All pictures and videos of a folder and its subfolders, by name; or the samples of shards in a folder, at a URL
    or from a command, fetched with the settings in `data`. Prints what else is in the folder, and is not used, to
    stderr. Raises DataError if there are none."""
    if is_remote(folder) or (Path(folder) / INDEX_NAME).is_file() or any(Path(folder).glob("*.tar")):
        return list(_shard_media(folder, replace(data, allow_pipe=True)))  # the user has named the command
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder; name one with pictures, videos or shards")
    files, passed = files_below(root)
    found = []
    for path in files:
        kind = kind_of_file(path)
        if kind is None:
            passed.append((path, NO_MEDIA))
            continue
        facts = path.stat()
        place = os.path.abspath(path)
        found.append(Media(place, facts.st_size, facts.st_mtime_ns, partial(read_file, path, kind, True)))
    if passed:
        tell(f"{folder}: not used: {described(passed, root)}", sys.stderr)
    if not found:
        names = ", *.".join((*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, "tar"))
        raise DataError(f"{folder}: no pictures, videos or shards in it; name a folder with files such as *.{names}")
    return found


def read_file(path: Path, kind: str, by_content: bool = False) -> Sample:
    """A user's own "image" or "video" as a sample; `by_content`: what the file is decides, if that can be seen.

    Raises DataError if the file cannot be read.
    """
    try:
        media = require_regular(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name an existing file") from None
    return to_sample(media, (by_content and media_kind(media[:HEAD])) or kind, str(path))


def to_sample(media: Any, kind: str, name: str = "") -> Sample:
    """An "image" or "video" as a sample: a path, encoded bytes, or for an image a PIL image or an array uint8
    [h, w, 3], [h, w, 4] or [h, w]. Raises DataError for anything else, and for unreadable files."""
    if isinstance(media, (str, os.PathLike)):
        return read_file(Path(media), kind)
    if isinstance(media, (bytes, bytearray, memoryview)):
        encoded = bytes(media)
    elif kind == "image":
        encoded = _encoded(media)
    else:
        raise DataError(f"a video cannot be made from {type(media).__name__}: give a path or encoded bytes")
    extension = IMAGE_EXTENSIONS[0] if kind == "image" else VIDEO_EXTENSIONS[0]
    if media_kind(encoded[:HEAD]) == kind:
        encoded = stored(encoded).data
    return Sample(name, SourceConfig(), epoch=0, media=encoded, media_type=extension, text="", meta={})


def first_picture(sample: Sample) -> Image.Image:
    """The image, or the first frame of the video, at full resolution. Raises DataError."""
    media = media_of(sample)
    if sample.is_video:
        return Image.fromarray(decode_video(media, 1, "first")[0][1])
    return Image.fromarray(decode_image(media))


def in_batches(
    media: Iterable[Media], encode: Callable[[Sample], T], failed: Failed
) -> Iterator[list[tuple[Media, str, T]]]:
    """Batches of up to BATCH (media, name, encoded sample), in order; `failed` is called for the others."""
    batch: list[tuple[Media, str, T]] = []
    for item in media:
        try:
            sample = item.read()
        except DataError as error:
            failed(item.place, str(error))
            continue
        try:
            batch.append((item, sample.key, encode(sample)))
        except DataError as error:
            failed(sample.key, f"{error}; {format_hint(sample)}")
            continue
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _shard_media(folder: str, data: DataConfig) -> Iterator[Media]:
    index = ShardIndex.load(folder, data)
    origin = folder if index.remote else os.path.abspath(folder)
    for number, shard in enumerate(index.shards):
        mtime = 0 if index.remote else (index.folder / shard.name).stat().st_mtime_ns
        for sample in range(shard.samples):
            place = f"{origin}/{shard.name}#{sample}"
            yield Media(place, shard.bytes, mtime, partial(read_sample, index, number, sample))


def _encoded(picture: Any) -> bytes:
    """A PIL image or an array as PNG bytes; uncompressed, because it is decoded at once."""
    if not isinstance(picture, Image.Image):
        pixels = np.asarray(picture)
        if (
            pixels.dtype != np.uint8
            or not pixels.size
            or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)))
        ):
            raise DataError(
                f"an image cannot be made from {type(picture).__name__} of {pixels.dtype} {list(pixels.shape)}: give a "
                "path, bytes, a PIL image, or an array uint8 [h, w, 3], [h, w, 4] or [h, w]"
            )
        picture = Image.fromarray(np.ascontiguousarray(pixels))
    with contextlib.suppress(Exception):  # Pillow raises anything for malformed metadata
        picture = ImageOps.exif_transpose(picture)
    if picture.mode not in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=0)
    return file.getvalue()


def encode_all(encode: Callable[[Sample], T], samples: Sequence[Sample]) -> list[T]:
    """Encode every sample. Raises DataError, with the file's name if the sample is a file."""
    encoded: list[T] = []
    for sample in samples:
        try:
            encoded.append(encode(sample))
        except DataError as error:
            raise DataError(f"{sample.key}: {error}; {format_hint(sample)}" if sample.key else str(error)) from error
    return encoded


def format_hint(sample: Sample) -> str:
    """The fix for a sample that cannot be decoded, for an error message."""
    if sample.media is None and sample.recording is not None:
        return "give a whole FLAC, WAV, MP3 or Opus file"
    return "give a whole video that FFmpeg reads" if sample.is_video else "save it as a JPEG, PNG or WebP"
