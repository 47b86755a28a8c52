"""Recordings of speech for the tests: waveforms, files of every kind, and the programs and voices that may be there."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

KINDS = {
    "flac": ("flac", "flac"),
    "wav": ("pcm_s16le", "wav"),
    "mp3": ("libmp3lame", "mp3"),
    "opus": ("libopus", "ogg"),
}
VOICES = Path("/usr/share/asterisk/sounds/en")

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="no program espeak-ng: nothing was spoken (Debian package espeak-ng)"
)
needs_voices = pytest.mark.skipif(
    not VOICES.is_dir(), reason=f"no {VOICES}: no recorded voice was read (Debian package asterisk-core-sounds-en-wav)"
)


def tones(seconds: float = 1.0, rate: int = 16_000) -> np.ndarray:
    """Two tones that become louder: float32 [n] in -0.5 to 0.5, far below 4 kHz."""
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.2 * np.sin(2 * np.pi * 1000 * t)
    return (wave * np.linspace(0.2, 1, len(t))).astype(np.float32)


def recording(kind: str = "flac", wave: np.ndarray | None = None, rate: int = 16_000) -> bytes:
    """A file of a waveform below 1, float32 [n] or [n, channels], by default `tones()`. `kind`: of KINDS."""
    codec, container = KINDS[kind]
    return encoded(tones() if wave is None else wave, rate, codec, container)


def encoded(wave: np.ndarray, rate: int, codec: str, container: str) -> bytes:
    """As `recording`, by FFmpeg's names."""
    wave = wave[:, None] if wave.ndim == 1 else wave
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[wave.shape[1]]
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"fflags": "+bitexact"}) as target:
        stream = target.add_stream(codec, rate=rate, layout=layout)
        stream.codec_context.open()
        pcm = np.round(wave * 32768).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(
            stream.format.name, layout, rate, frame_size=stream.codec_context.frame_size or 1024
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            target.mux(stream.encode(part))
        target.mux(stream.encode(None))
    return file.getvalue()
