"""Recordings that no voice spoke: every letter is a tone, so that a small model can learn to hear words."""

from __future__ import annotations

import io
import wave

import numpy as np

RATE = 16_000  # Hz
_LETTER = 0.04  # seconds


def toned(text: str, rate: int = RATE) -> bytes:
    """A WAV file, one channel, 16 bits. A space is silence."""
    times = np.arange(round(_LETTER * rate)) / rate
    tones = [
        np.zeros_like(times) if letter == " " else np.sin(2 * np.pi * (200 + 45 * (ord(letter) % 64)) * times)
        for letter in text
    ]
    samples = (0.4 * 32767 * np.concatenate(tones)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(samples.tobytes())
    return file.getvalue()
