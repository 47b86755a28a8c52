"""One sample of a shard: the files of one key, media still encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi")


@dataclass(frozen=True)
class Sample:
    """One sample of a tar, its media still encoded. `text` is KEY.txt, `meta` is KEY.json ({} if absent)."""

    key: str
    source: str
    epoch: int  # of its source
    media: bytes | None
    media_type: str  # extension: "jpg", "mp4", ...; "" without media
    text: str
    meta: dict[str, Any]

    @property
    def is_video(self) -> bool:
        """Whether its media are a video."""
        return self.media_type in VIDEO_EXTENSIONS
