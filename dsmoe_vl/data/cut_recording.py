"""Whether a recording is cut short: its last words would be missing, and nothing in its waveform shows it."""

from __future__ import annotations

from dsmoe_vl.data.video_file import LEAST_SHARE

_SLACK_SECONDS = 0.1  # a few frames of MP3, which its decoder drops at the ends
_OF_A_PIPE = 0x7FFFF000  # sizes from here on stand for "not known" in a WAV file that was written to a pipe
_PAGE, _PAGE_HEAD = b"OggS", 27  # of Ogg; bytes before the sizes of its segments
_TAGS = (b"Xing", b"Info")  # of MP3, with the number of frames; without them FFmpeg guesses a length
_ID3_HEAD, _FRAME_HEAD = 10, 200  # bytes


def is_cut(data: bytes, container: str, seconds: float, stated_seconds: float) -> bool:
    """Whether less than LEAST_SHARE is there of what a recording states. One that states no length is whole.

    `container` as in `container_of_recording`; `seconds` were decoded, FFmpeg says `stated_seconds` (0: not known).
    """
    if container == "wav":
        return _share_of_wav(data) < LEAST_SHARE
    if container == "ogg":
        return not _ends_with_a_page(data)
    if container == "mp3" and not _states_its_length(data):
        return False
    return seconds + _SLACK_SECONDS < LEAST_SHARE * stated_seconds


def _share_of_wav(data: bytes) -> float:
    """How much of its chunk `data` is there. FFmpeg looks at the bytes that are there alone."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return 1.0 if not 0 < size < _OF_A_PIPE else (len(data) - at - 8) / size
        at += 8 + size + size % 2
    return 1.0


def _ends_with_a_page(data: bytes) -> bool:
    """Pages are up to a second long and state their own size; live recordings have no mark of the last one."""
    at = data.rfind(_PAGE)
    count = int.from_bytes(data[at + _PAGE_HEAD - 1 : at + _PAGE_HEAD], "little")
    start = at + _PAGE_HEAD + count
    return at >= 0 and start + sum(data[at + _PAGE_HEAD : start]) <= len(data)


def _states_its_length(data: bytes) -> bool:
    first = 0
    if data[:3] == b"ID3":  # a size of four bytes with seven bits each
        first = _ID3_HEAD + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False))
    return any(tag in data[first : first + _FRAME_HEAD] for tag in _TAGS)
