"""One sample of a shard: the files of one key, media still encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsmoe_vl.config.recipe import SourceConfig

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi")
MEDIA_EXTENSIONS = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS
SPEECH_EXTENSIONS = ("flac", "wav", "mp3", "opus")
TEXT_EXTENSIONS = ("txt", "json")
EXTENSIONS = MEDIA_EXTENSIONS + SPEECH_EXTENSIONS + TEXT_EXTENSIONS  # of files that are read


@dataclass(frozen=True)
class Sample:
    """One sample of a tar, its media still encoded. `text` is KEY.txt, `meta` is KEY.json ({} if absent).

    `media`: its image or video; `recording`: of speech, KEY.`recording_type`, beside or instead of it.

    For messages: `names` of all its files in the tar, and a known `habit` that explains a missing one, if any.
    """

    key: str
    source: SourceConfig  # the recipe's, or one made of a path; a user's own media have one without a name
    epoch: int  # of its source
    media: bytes | None
    media_type: str  # extension: "jpg", "mp4", ...; "" without media
    text: str
    meta: dict[str, Any]
    names: tuple[str, ...] = ()
    habit: str = ""
    recording: bytes | None = None
    recording_type: str = ""  # extension: "flac", ...; "" without a recording

    @property
    def is_video(self) -> bool:
        """Whether its media are a video."""
        return self.media_type in VIDEO_EXTENSIONS


def split_name(name: str) -> tuple[str, str]:
    """("dir/key", "ext"); ("", "") for a name that belongs to no sample, such as that of a folder or hidden file."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not (stem and dot):
        return "", ""
    return folder + slash + stem, extension.lower()
