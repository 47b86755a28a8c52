"""Recordings of speech among the files of a dataset: which files they are, and what is stored of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.media_kind import HEAD, container, image_format
from dsmoe_vl.data.recording import container_of_recording, seconds_of_recording
from dsmoe_vl.data.sample import SPEECH_EXTENSIONS
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

LIMIT = DataConfig().speech_max_seconds
TOO_LONG = f"recording longer than data.speech_max_seconds = {LIMIT:g}, by default not trained on: cut it into parts"

_FIX = "save it as FLAC, such as by `ffmpeg -i FILE -vn FILE.flac`"
# Containers of shards by FFmpeg's names. An Ogg file is stored as .opus, whether it has Opus or Vorbis.
_EXTENSIONS = {"flac": "flac", "wav": "wav", "mp3": "mp3", "ogg": "opus"}
# First bytes of sound that FFmpeg reads and shards do not have.
_FOREIGN = {
    b"#!AMR": "AMR",
    b".snd": "AU",
    b"caff": "CAF",
    b"RF64": "RF64",
    b"riff": "Wave64",
    b"wvpk": "WavPack",
    b"MAC ": "Monkey's Audio",
    b"FORM": "AIFF",
    bytes.fromhex("3026b2758e66cf11"): "WMA",
    **{bytes((0xFF, byte)): "AAC" for byte in (0xF0, 0xF1, 0xF8, 0xF9)},
}


def is_recording(path: Path) -> bool:
    """Whether a file that is no image or video is sound: by its name, if that is usual, else by its first bytes."""
    if path.suffix.lower().removeprefix(".") in SPEECH_EXTENSIONS:
        return True
    try:
        with require_regular(path).open("rb") as file:
            head = file.read(HEAD)
    except (OSError, ValueError):  # ValueError: an impossible file name
        return False
    return container_of_recording(head) is not None or bool(_foreign(head))


def recording_facts(data: bytes) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The extension of a recording in a shard, what is known of it for KEY.json, and notes.

    It is decoded as in training, but may be longer. Raises DataError if it cannot be decoded, naming the fix.
    """
    kind = container_of_recording(data[:12])
    if kind is None:
        raise DataError(f"not a FLAC, WAV, MP3 or Opus file: {_what_it_is(data[:HEAD])}")
    seconds = seconds_of_recording(data)
    return _EXTENSIONS[kind], {"speech_seconds": round(seconds, 3) or None}, (TOO_LONG,) if seconds > LIMIT else ()


def _what_it_is(head: bytes) -> str:
    if not head:
        return "it is empty"
    video = container(head)
    found = _foreign(head) or (f"a container of videos ({video})" if video else "no sound that is known")
    return f"{found}; {_FIX}"


def _foreign(head: bytes) -> str:
    """The format of sound that shards do not have; "" if it is none."""
    if container(head) is not None or image_format(head) is not None:
        return ""
    if head[4:8] == b"ftyp":
        return "M4A"
    name = next((name for first, name in _FOREIGN.items() if head.startswith(first)), "")
    return "" if name == "AIFF" and head[8:12] not in (b"AIFF", b"AIFC") else name
