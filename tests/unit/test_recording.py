"""Recordings: every kind becomes the waveform that it has, and log-mel frames are those of Whisper."""

from __future__ import annotations

import io
import wave as wave_files

import numpy as np
import pytest

from dsmoe_vl.config.model import FRAMES_OF_STATE
from dsmoe_vl.data.recording import (
    SAMPLE_RATE,
    cells_of,
    container_of_recording,
    decode_recording,
    log_mel,
    seconds_of_recording,
    whole_cells,
)
from dsmoe_vl.errors import DataError
from tests.support.sound_files import KINDS, VOICES, encoded, needs_voices, recording, tones

# The greatest difference to what was encoded: half a step of 16 bits, or what a codec loses.
LOSS = {"flac": 2e-5, "wav": 2e-5, "mp3": 0.04, "opus": 0.04}


class TestDecoding:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_is_the_waveform_that_was_encoded(self, kind):
        data, wave = recording(kind), tones()
        assert container_of_recording(data[:12]) == KINDS[kind][1]
        found = decode_recording(data)
        assert found.dtype == np.float32 and len(found) == len(wave)
        assert np.abs(found - wave).max() < LOSS[kind]
        assert seconds_of_recording(data) == len(wave) / SAMPLE_RATE

    @pytest.mark.parametrize("kind", ["flac", "wav", "mp3"])
    def test_another_rate_becomes_16_khz(self, kind):
        found, wave = decode_recording(recording(kind, tones(1.0, 44_100), 44_100)), tones()
        assert abs(len(found) - len(wave)) <= 32
        inside = slice(200, 15_800)  # a filter rings at the ends
        assert np.abs(found[inside] - wave[inside]).max() < LOSS[kind] + 2e-3

    def test_channels_become_their_mean(self):
        left = tones(1.0, 44_100)
        stereo = np.stack((left, 0.5 * left[::-1]), axis=1)
        mixed = decode_recording(recording("flac", stereo.mean(axis=1), 44_100))
        found = decode_recording(recording("flac", stereo, 44_100))
        assert len(found) == len(mixed) and np.abs(found - mixed).max() < 1e-4
        assert np.abs(decode_recording(recording("wav", np.stack((left, -left), axis=1), 44_100))).max() < 1e-4

    @pytest.mark.parametrize("kind", ["flac", "wav", "opus"])
    @pytest.mark.parametrize("channels", [6, 8])
    def test_many_channels(self, kind, channels):
        data = recording(kind, np.repeat(tones(1.0, 48_000)[:, None], channels, axis=1), 48_000)
        found = decode_recording(data)
        # Opus and its channel of low notes lose a part of the higher tone.
        assert np.abs(found[200:15_800] - tones()[200:15_800]).max() < (0.15 if kind == "opus" else 2e-3)

    @pytest.mark.parametrize("count", [1, 2, 5, 100, 199, 200, 201, 399, 400])
    @pytest.mark.parametrize("kind", ["flac", "wav"])
    def test_short_ones(self, kind, count):
        found = decode_recording(recording(kind, tones()[-count:]))
        assert len(found) == count and np.abs(found - tones()[-count:]).max() < 2e-5
        frames = log_mel(found, 80)
        assert frames.shape == (-(-count // 160), 80) and np.isfinite(frames).all()

    def test_a_limit(self):
        data = recording("flac", tones(2.0))
        assert len(decode_recording(data, 2.0)) == 32_000
        with pytest.raises(DataError, match=r"recording too long: more than data.speech_max_seconds = 1.9; cut it"):
            decode_recording(data, 1.9)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_that_is_cut_short_is_refused(self, kind, share):
        data = recording(kind, tones(3.0))
        for read in (decode_recording, seconds_of_recording):
            with pytest.raises(DataError, match="recording cannot be decoded: "):
                read(data[: int(share * len(data))])

    def test_what_states_no_length_is_whole(self):
        data = bytearray(recording("wav"))
        at = data.index(b"data") + 4
        for size in (0x7FFFF000, 0xFFFFFFFF):  # of espeak-ng and of FFmpeg, to a pipe
            data[at : at + 4] = size.to_bytes(4, "little")
            assert len(decode_recording(bytes(data))) == 16_000

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "not a FLAC, WAV, MP3 or Opus file"),
            (b"no sound at all", "not a FLAC, WAV, MP3 or Opus file"),
            (b"fLaC", "cannot be decoded"),
            (b"ID3\x04\0\0\0\0\0\0", "cannot be decoded"),
            (b"OggS" + bytes(100), "cannot be decoded"),
            (b"RIFF\x24\0\0\0WAVEfmt ", "cannot be decoded"),
        ],
    )
    def test_what_is_none(self, data, message):
        with pytest.raises(DataError, match=message):
            decode_recording(data)

    def test_no_samples_damaged_rates_and_values(self):
        empty = io.BytesIO()
        with wave_files.open(empty, "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
        with pytest.raises(DataError, match="it is empty"):
            decode_recording(empty.getvalue())
        data = bytearray(recording("wav"))
        data[24:28] = (1).to_bytes(4, "little")
        with pytest.raises(DataError, match="1 samples a second"):
            decode_recording(bytes(data))
        data = bytearray(encoded(tones(), 16_000, "pcm_f32le", "wav"))
        data[-400:-396] = np.float32("nan").tobytes()
        with pytest.raises(DataError, match="not finite"):
            decode_recording(bytes(data))

    @needs_voices
    def test_recorded_voices(self):
        paths = sorted(VOICES.rglob("*.wav"))[:100]
        assert paths
        for path in paths:
            with wave_files.open(str(path)) as file:
                seconds = file.getnframes() / file.getframerate()
            found = decode_recording(path.read_bytes())
            assert abs(len(found) / SAMPLE_RATE - seconds) < 0.005 and 0.01 < np.abs(found).max() < 1.5, path


class TestFrames:
    def test_log_mel_is_whispers(self):
        transformers = pytest.importorskip("transformers")
        rng = np.random.default_rng(0)
        spoken = np.concatenate((tones(4.0), 0.1 * rng.normal(size=40_000))).astype(np.float32)
        padded = np.pad(spoken, (0, 480_000 - len(spoken)))
        for bands in (80, 128):
            extractor = transformers.WhisperFeatureExtractor(feature_size=bands)
            theirs = extractor(padded, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0].T
            ours = log_mel(padded, bands)
            assert ours.shape == theirs.shape == (3000, bands) and ours.dtype == np.float32
            assert np.abs(ours - theirs).max() < 1e-4

    def test_silence_and_frames_a_second(self):
        assert (log_mel(np.zeros(1600, np.float32), 80) == -1.5).all()
        assert [len(log_mel(np.zeros(n, np.float32), 8)) for n in (1, 160, 161, 400, 16_000)] == [1, 1, 2, 3, 100]

    @pytest.mark.parametrize("merge", [1, 2, 6, 25])
    def test_cells(self, merge):
        cell = merge * FRAMES_OF_STATE
        for count in (1, 3, 4, 5, cell - FRAMES_OF_STATE, cell - FRAMES_OF_STATE + 1, cell, 2 * cell, 3000):
            frames = np.full((count, 8), 0.5, np.float32)
            whole = whole_cells(frames, merge)
            assert len(whole) == cells_of(count, merge) * cell and whole.dtype == np.float32
            assert (whole[:count] == frames).all() and (whole[count:] == 0).all()
            # One state of silence at least, and no cell that is silence alone but for that state.
            assert FRAMES_OF_STATE <= len(whole) - count < cell + FRAMES_OF_STATE
