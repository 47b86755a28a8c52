"""A model that hears, from shards to answers: real processes, words of tones (tests/support/recordings.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_tools.inspect import inspect
from data_tools.synthetic.scenes import scene
from data_tools.writer import ShardWriter
from dsmoe_vl import load
from tests.support.recordings import toned
from tests.support.runs import REPOSITORY, SHOWS_SAMPLES, finish, metrics, python, start, two_ranks

COLOURS, SHAPES = ("red", "blue", "green", "black"), ("circle", "square", "star", "ring")
STEPS = 60


def _write(folder, split, count):
    with ShardWriter(folder, split) as writer:
        for number in range(count):
            rng = np.random.default_rng([number, split == "eval"])
            picture, _ = scene(rng, False, 48, 1)
            words = f"{COLOURS[rng.integers(4)]} {SHAPES[rng.integers(4)]}"
            meta = {"captions": [words], "tasks": ["retrieval", "transcript"]}
            writer.write(f"{split}-{number}", picture, "jpg", words, meta, recording=toned(words), recording_type="wav")


@pytest.fixture(scope="module")
def hearing(tiny, tmp_path_factory):
    """A run of two ranks, with two experts on each, that learned to hear sixteen pairs of words."""
    folder = tmp_path_factory.mktemp("hearing")
    _write(folder / "train", "train", 160)
    _write(folder / "eval", "eval", 24)
    arguments = tiny.arguments(
        folder / "run", f"run.steps={STEPS}", "run.evaluate_every=0", f"run.checkpoint_every={STEPS}",
        f'data.sources=[{{name="s", path="{folder}/train"}}]',
        f'data.evaluation=[{{name="s", path="{folder}/eval"}}]',
        "model.speech.layers=1", "model.speech.width=32", "model.speech.heads=2", "model.speech.ffn_width=64",
        "model.speech.bands=40", "model.speech.merge=2", "data.speech_max_seconds=2", "data.pack_speech_seconds=20",
        "tasks.caption.weight=0", "tasks.transcript.weight=1", "tasks.retrieval.weight=0.2",
        "tasks.retrieval.spoken=0.5", "tasks.retrieval.embedding_width=16", "tokenizer.vocab_size=330",
        SHOWS_SAMPLES,
    )  # fmt: skip
    result = two_ranks(arguments, 240)
    assert result.status == 0, result.err[-3000:]
    return folder


def test_the_shards_have_recordings_that_training_can_use(hearing):
    report = inspect(hearing / "eval")
    assert report.samples == 24 and not report.problems


def test_words_are_learned_from_sound_alone(hearing):
    lines = [line for line in metrics(hearing / "run") if "loss_transcript" in line]
    assert lines[-1]["loss_transcript"] < 0.35 * lines[0]["loss_transcript"]


def test_transcripts_are_among_the_samples_of_training(hearing):
    (lines,) = (hearing / "run/samples").glob("step_*.jsonl")
    answers = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(answers) == 8 and all(answer["said"] and "transcript" in answer for answer in answers)


def test_the_evaluation_scores_transcripts_and_spoken_queries(hearing):
    result = finish(start(python(REPOSITORY / "launch/evaluate.py", "--run", hearing / "run", "--show", 2)), 180)
    assert result.status == 0, result.err[-3000:]
    ((found),) = json.loads((hearing / "run/eval.json").read_text()).values()
    assert found["transcript"]["samples"] == 24 and found["transcript"].keys() >= {"word_error_rate", "exact"}
    assert found["retrieval"]["spoken"] == found["retrieval"]["samples"] == 24
    assert {"speech_to_media_r1", "speech_to_media_median_rank"} <= found["retrieval"].keys()
    page = (hearing / "run/report.html").read_text()
    assert "Transcripts beside what was said" in page and "speech to picture" in page


def test_files_are_transcribed_and_searched_with(hearing, tmp_path):
    sound, bad = tmp_path / "query.wav", tmp_path / "bad.wav"
    sound.write_bytes(toned("blue star"))
    bad.write_bytes(b"no sound")
    generate, run = REPOSITORY / "launch/generate.py", hearing / "run"
    wrote = start(python(generate, "transcribe", "--run", run, "--speech", sound, bad, "--json", tmp_path / "t.json"))
    searched = start(
        python(generate, "retrieve", "--run", run, "--media", hearing / "eval", "--speech", sound, "--top", 3)
    )
    said = finish(wrote)
    assert said.status == 1 and "not a FLAC, WAV, MP3 or Opus file; give a whole" in said.err
    (row,) = json.loads((tmp_path / "t.json").read_text())
    assert said.out == f"{sound}\t{row['transcript']}\n"
    found = finish(searched)
    assert found.status == 0 and len(found.out.splitlines()) == 3, found.err

    model = load(run, device="cpu")
    assert model.transcribe(toned("blue star")) == row["transcript"] == model.transcribe([str(sound)])[0]
    assert model.similarity(model.embed_speech(sound), model.embed_speech([sound, toned("red ring")])).shape == (2,)


def test_a_run_that_does_not_hear_says_so(trained, tmp_path):
    sound = tmp_path / "query.wav"
    sound.write_bytes(toned("blue star"))
    result = finish(start(python(REPOSITORY / "launch/generate.py", "transcribe", "--run", trained, "--speech", sound)))
    assert result.status == 2 and "tasks.transcript.weight above 0" in result.err
