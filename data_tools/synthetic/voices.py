"""Captions of the synthetic world spoken by espeak-ng, a program that makes speech by rules."""

from __future__ import annotations

import io
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache

import av
import numpy as np

from dsmoe_vl.data.recording import SAMPLE_RATE
from dsmoe_vl.errors import DataError

_PROGRAM = "espeak-ng"
# Accents and speakers of espeak-ng. Nothing of a held-out voice occurs in training.
_ACCENTS = {False: ("en-us", "en", "en-gb-x-rp", "en-029"), True: ("en-gb-scotland", "en-gb-x-gbcwmd")}
_SPEAKERS = {False: ("m1", "m2", "m3", "m4", "m7", "f1", "f2", "f5"), True: ("m5", "m6", "f3", "f4")}
_SPEEDS = (130, 150, 170, 190)  # words a minute
_PITCHES = (35, 45, 55, 65)  # of 0 to 99
_RATE = 22_050  # Hz, of espeak-ng
_HEADER = 44  # bytes before the samples; its sizes are those of a pipe
_REMEMBERED = 1024  # recordings of about 30 KiB


@dataclass(frozen=True)
class Voice:
    """Who speaks, and how."""

    name: str  # ACCENT+SPEAKER
    speed: int
    pitch: int

    def __str__(self) -> str:
        return f"{self.name}, speed {self.speed}, pitch {self.pitch}"

    @classmethod
    def choose(cls, rng: np.random.Generator, held_out: bool) -> Voice:
        """Any voice of a split."""
        accent, speaker = (str(rng.choice(table[held_out])) for table in (_ACCENTS, _SPEAKERS))
        return cls(f"{accent}+{speaker}", int(rng.choice(_SPEEDS)), int(rng.choice(_PITCHES)))


def require_speech() -> None:
    """Raises DataError without espeak-ng."""
    if shutil.which(_PROGRAM) is None:
        raise DataError(
            f"--speech: no program {_PROGRAM}: install the Debian package {_PROGRAM}, or leave --speech out"
        )


@lru_cache(_REMEMBERED)
def spoken(text: str, voice: Voice) -> tuple[bytes, float]:
    """A FLAC file of one channel at SAMPLE_RATE, and its seconds. The same arguments give the same bytes.

    Raises DataError if espeak-ng fails.
    """
    command = [_PROGRAM, "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdin", "--stdout"]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    samples = np.frombuffer(done.stdout[_HEADER:][: len(done.stdout[_HEADER:]) // 2 * 2], "<i2")
    if done.returncode or not len(samples):
        said = done.stderr.decode("utf-8", "replace").strip() or "no sound"
        raise DataError(f"--speech: {' '.join(command)}: status {done.returncode}: {said}")
    return _as_flac(samples)


def _as_flac(samples: np.ndarray) -> tuple[bytes, float]:
    """int16 [n] at _RATE."""
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts = _RATE, 0
    file, count = io.BytesIO(), 0
    with av.open(file, "w", format="flac", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        stream.format = "s16"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.codec_context.open()
        resampler = av.AudioResampler("s16", "mono", SAMPLE_RATE, frame_size=stream.codec_context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            count += part.samples
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue(), count / SAMPLE_RATE
