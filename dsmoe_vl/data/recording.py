"""Recordings of speech: encoded bytes -> waveform -> log-mel frames.

Shapes: n samples at SAMPLE_RATE, f frames of 10 ms, M mel bands.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import av
import numpy as np

from dsmoe_vl.config.model import FRAMES_OF_STATE
from dsmoe_vl.data.container_file import reading
from dsmoe_vl.data.cut_recording import is_cut
from dsmoe_vl.errors import DataError

SAMPLE_RATE = 16_000  # Hz
FRAMES_A_SECOND = 100

_RATES = (1_000, 768_000)  # Hz; beyond them a header is damaged, and seconds would become gigabytes
_WINDOW = 400  # samples of a frame's window: 25 ms
_HOP = SAMPLE_RATE // FRAMES_A_SECOND
_FLOOR, _RANGE = 1e-10, 8.0  # the least power; below the loudest one, in powers of ten, everything is silence


def container_of_recording(head: bytes) -> str | None:
    """FFmpeg's name of a recording's container, by the first bytes; None: not FLAC, WAV, MP3 or Ogg (Opus, Vorbis)."""
    if head[:4] == b"fLaC":
        return "flac"
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"OggS":
        return "ogg"
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):  # layer 3
        return "mp3"
    return None


def decode_recording(data: bytes, max_seconds: float = float("inf")) -> np.ndarray:
    """The waveform as float32 [n] in about -1 to 1: one channel, the mean of all, at SAMPLE_RATE.

    Raises DataError if `data` is no recording, cannot be decoded to its end, is cut short (`cut_recording.py`), is
    empty, or is longer than `max_seconds`.
    """
    limit, parts, length = max_seconds * SAMPLE_RATE, [], 0
    for part in _decoded(data):
        parts.append(part)
        length += len(part)
        if length > limit:
            raise DataError(
                f"recording too long: more than data.speech_max_seconds = {max_seconds:g}; cut it into parts, or raise "
                "the limit in the recipe"
            )
    return np.concatenate(parts)


def seconds_of_recording(data: bytes) -> float:
    """Its length, after decoding it as `decode_recording` does, which keeps nothing of it: it may be hours long.

    Raises DataError as `decode_recording` without a limit.
    """
    return sum(map(len, _decoded(data))) / SAMPLE_RATE


def _decoded(data: bytes) -> Iterator[np.ndarray]:
    """The parts of the waveform, float32 [n] each, one at least. Raises DataError."""
    container = container_of_recording(data[:12])
    if container is None:
        raise DataError("recording cannot be decoded: not a FLAC, WAV, MP3 or Opus file")
    length, stated = 0, 0.0
    with reading(data, container, "recording") as file:
        if not file.streams.audio:
            raise DataError("recording cannot be decoded: it has no sound")
        stream = file.streams.audio[0]
        if stream.duration is not None and stream.time_base is not None:
            stated = float(stream.duration * stream.time_base)
        # The channels stay: FFmpeg's own mix of two would be 1.4 times as loud as their mean. And they stay
        # interleaved: reading eight or more planes ends the process.
        resampler = av.AudioResampler(format="flt", rate=SAMPLE_RATE)
        # None at the end: what the resampler still has.
        for frame in chain(file.decode(stream), [None]):
            if frame is not None and not _RATES[0] <= frame.sample_rate <= _RATES[1]:
                raise DataError(f"recording cannot be decoded: {frame.sample_rate} samples a second")
            for resampled in resampler.resample(frame):
                channels = resampled.to_ndarray().reshape(-1, resampled.layout.nb_channels)
                part = channels.mean(axis=1, dtype=np.float32)
                if not np.isfinite(part).all():
                    raise DataError("recording cannot be decoded: it has values that are not finite")
                length += len(part)
                yield part
    if not length:
        raise DataError("recording cannot be decoded: it is empty")
    if is_cut(data, container, length / SAMPLE_RATE, stated):
        raise DataError("recording cannot be decoded: it is cut short; copy or download it again")


def log_mel(waveform: np.ndarray, bands: int) -> np.ndarray:
    """Log-mel frames as Whisper's (Radford et al. 2022, section 2.2): float32 [n], not empty -> float32 [f, bands].

    A frame is centred on every hop; beyond the ends the waveform is mirrored. What is more than 80 dB below the loudest
    value counts as 80 dB below it. Values are about -1 to 1.5.
    """
    half = _WINDOW // 2
    signal = waveform.astype(np.float64)  # one that is shorter than half a window cannot be mirrored
    padded = np.pad(signal, half, "reflect") if len(signal) > half else np.pad(signal, half)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][: -(-len(waveform) // _HOP)]
    window = np.hanning(_WINDOW + 1)[:-1]
    powers = np.abs(np.fft.rfft(frames * window, axis=-1)) ** 2
    logs = np.log10(np.maximum(powers @ _mel_filters(bands), _FLOOR))
    logs = np.maximum(logs, logs.max() - _RANGE)
    return ((logs + 4.0) / 4.0).astype(np.float32)


def cells_of(frames: int, merge: int) -> int:
    """Speech tokens of a recording, each `merge` states long. At least one state at the end is silence: a convolution
    of the next recording reads it."""
    return -(-(frames + FRAMES_OF_STATE) // (FRAMES_OF_STATE * merge))


def whole_cells(frames: np.ndarray, merge: int) -> np.ndarray:
    """Frames [f, M], with zeros at their end for whole cells: float32 [cells * merge * FRAMES_OF_STATE, M]."""
    wanted = cells_of(len(frames), merge) * merge * FRAMES_OF_STATE
    return np.concatenate((frames, np.zeros((wanted - len(frames), frames.shape[1]), np.float32)))


@lru_cache(maxsize=8)
def _mel_filters(bands: int) -> np.ndarray:
    """Triangles of equal area on the mel scale of Slaney (Auditory Toolbox, 1998): float64 [_WINDOW / 2 + 1, bands]."""
    edges = _hertz(np.linspace(_mels(0.0), _mels(SAMPLE_RATE / 2), bands + 2))
    bins = np.linspace(0.0, SAMPLE_RATE / 2, _WINDOW // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))
    filters.setflags(write=False)
    return filters


_LINEAR_MELS, _LINEAR_HERTZ, _STEP = 15.0, 1000.0, np.log(6.4) / 27.0  # linear below 1 kHz, logarithmic above


def _mels(hertz: float) -> float:
    linear = hertz * _LINEAR_MELS / _LINEAR_HERTZ
    return linear if hertz < _LINEAR_HERTZ else _LINEAR_MELS + float(np.log(hertz / _LINEAR_HERTZ) / _STEP)


def _hertz(mels: np.ndarray) -> np.ndarray:
    linear = mels * _LINEAR_HERTZ / _LINEAR_MELS
    return np.where(mels < _LINEAR_MELS, linear, _LINEAR_HERTZ * np.exp(_STEP * (mels - _LINEAR_MELS)))
