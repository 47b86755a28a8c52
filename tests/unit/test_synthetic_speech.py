"""The synthetic world with its captions spoken: the words are those of a caption, the voices those of the split."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from data_tools.inspect import inspect
from data_tools.synthetic import voices
from data_tools.synthetic.generate import generate, main
from data_tools.synthetic.voices import Voice, spoken
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.recording import SAMPLE_RATE, decode_recording
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import DataError
from tests.support.sound_files import needs_espeak

SMALL = {"images": 70, "videos": 4, "eval_images": 20, "eval_videos": 4}
OF_SPEECH = {"transcript", "speech_seconds", "voice", "recording_sha256"}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Without and with speech."""
    folder = tmp_path_factory.mktemp("worlds")
    generate(folder / "silent", **SMALL)
    generate(folder / "spoken", **SMALL, speech=True)
    return folder / "silent", folder / "spoken"


def samples(world):
    for folder in sorted(world.iterdir()):
        for sample in iterate_samples(SourceConfig.at(folder)):
            yield folder.name, sample


@needs_espeak
def test_all_else_is_as_without_speech(worlds):
    for (_, silent), (_, loud) in zip(*map(samples, worlds), strict=True):
        assert (silent.media, silent.text, silent.recording) == (loud.media, loud.text, None)
        assert not OF_SPEECH & silent.meta.keys() and loud.meta.keys() > OF_SPEECH
        assert "transcript" not in silent.meta["tasks"] and loud.meta["tasks"] == [*silent.meta["tasks"], "transcript"]
        theirs = {name: value for name, value in loud.meta.items() if name not in OF_SPEECH | {"tasks"}}
        assert theirs == {name: value for name, value in silent.meta.items() if name != "tasks"}


@needs_espeak
def test_recordings_are_flac_of_16_khz_with_the_first_caption(worlds):
    for _, sample in samples(worlds[1]):
        assert sample.recording_type == "flac" and sample.recording[:4] == b"fLaC"
        waveform = decode_recording(sample.recording, 10.0)
        assert len(waveform) / SAMPLE_RATE == sample.meta["speech_seconds"] > 0.5
        assert 0.05 < np.abs(waveform).max() <= 1.0
        contents = contents_of(sample)
        assert contents.transcript == sample.meta["transcript"] == sample.meta["captions"][0]
        assert "transcript" in contents.tasks and not contents.problems
    report = inspect(worlds[1] / "images_eval")
    assert not report.problems and report.transcripts == 20


@needs_espeak
def test_held_out_voices_are_others(worlds):
    accents, speakers = {"train": set(), "eval": set()}, {"train": set(), "eval": set()}
    for folder, sample in samples(worlds[1]):
        accent, _, speaker = sample.meta["voice"].partition(",")[0].partition("+")
        split = folder.rpartition("_")[2]
        accents[split].add(accent), speakers[split].add(speaker)
    for found in (accents, speakers):
        assert len(found["train"]) >= 3 and len(found["eval"]) >= 2 and not found["train"] & found["eval"]


@needs_espeak
def test_every_voice_sounds_different():
    rng = np.random.default_rng(0)
    chosen = {
        dataclasses.replace(Voice.choose(rng, held_out), speed=150, pitch=45) for held_out in (0, 1) for _ in range(400)
    }
    assert len(chosen) == 4 * 8 + 2 * 4
    assert len({spoken("a dog", voice)[0] for voice in chosen}) == len(chosen)


@needs_espeak
def test_same_arguments_same_bytes(worlds, tmp_path):
    few = {**SMALL, "images": 8, "eval_images": 0}
    generate(tmp_path, **few, speech=True)
    for name in ("images_train", "videos_eval"):
        again = iterate_samples(SourceConfig.at(tmp_path / name))
        before = iterate_samples(SourceConfig.at(worlds[1] / name))
        pairs = list(zip(again, before, strict=False))
        assert len(pairs) >= 4
        for one, other in pairs:
            assert (one.recording, one.meta) == (other.recording, other.meta)
    voice = Voice("en-us+m1", 150, 45)
    first = spoken("a dog", voice)
    spoken.cache_clear()
    assert spoken("a dog", voice) == first


def test_without_espeak_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["--speech", "--output", str(tmp_path / "world")]) != 0
    said = capsys.readouterr().err.strip()
    assert "install the Debian package espeak-ng" in said and "\n" not in said
    assert not (tmp_path / "world").exists()


@needs_espeak
def test_a_program_that_fails(monkeypatch):
    with pytest.raises(
        DataError, match=r"--speech: espeak-ng -v xx\+m1 .*: Error: The specified espeak-ng voice does not"
    ):
        spoken("a dog", Voice("xx+m1", 150, 45))
    monkeypatch.setattr(voices, "_PROGRAM", "true")
    with pytest.raises(DataError, match=r"--speech: true .*status 0: no sound"):
        spoken("a cat", Voice("en-us+m1", 150, 45))
