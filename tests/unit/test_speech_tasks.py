"""What the tasks make of recordings: transcripts, captions that hear, spoken queries."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dsmoe_vl.config.checks import check_recipe
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.recording import cells_of, decode_recording, log_mel
from dsmoe_vl.data.segment import IGNORE, Modality
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from tests.support.recordings import toned
from tests.support.samples import sample

HEARS = (
    "model.speech.layers=1", "model.speech.width=16", "model.speech.heads=2", "model.speech.bands=20",
    "model.speech.merge=5", "data.speech_max_seconds=4", "tasks.transcript.weight=1", "tasks.retrieval.weight=1",
    "tokenizer.vocab_size=330",
)  # fmt: skip


def _tasks(tiny, *overrides):
    recipe = load_recipe(tiny.recipe, [*HEARS, *overrides])
    return {task.name: task for task in build_tasks(recipe, Tokenizer.of(recipe))}


def _heard(said="a red circle", **changes):
    return sample("image", recording=toned(said), recording_type="wav", **changes)


def _cells(text):
    return cells_of(len(log_mel(decode_recording(toned(text)), 20)), 5)


def test_a_transcript_is_speech_then_its_words(tiny):
    task = _tasks(tiny)["transcript"]
    one = _heard(media=None, media_type="", text="a red circle", meta={})
    (segment,) = task.encode(one)
    cells, words = _cells("a red circle"), task.tokenizer.encode("a red circle")
    speech, symbol = task.tokenizer.control("<speech>"), task.tokenizer.control("<transcript>")
    assert segment.tokens.tolist() == [speech] * cells + [symbol, *words]
    assert segment.labels.tolist() == [IGNORE] * cells + [*words, task.tokenizer.eos]
    assert segment.modality.tolist() == [Modality.SPEECH] * cells + [Modality.TEXT] * (1 + len(words))
    assert segment.recording.first == 0 and not segment.pictures and segment.recording.mel.shape[1] == 20


def test_the_words_are_the_transcript_else_the_only_caption(tiny):
    task = _tasks(tiny)["transcript"]
    several = {"captions": ["one", "two"]}
    assert contents_of(_heard(meta={**several, "transcript": "three"})).transcript == "three"
    assert contents_of(_heard(meta={"captions": ["one"]})).transcript == "one"
    with pytest.raises(DataError, match=r"no transcript: no `transcript` in KEY.json, and 2 captions, not one"):
        task.encode(_heard(meta=several))
    with pytest.raises(DataError, match="no recording"):
        task.encode(sample("image"))


@pytest.mark.parametrize(("hears", "kind"), [(False, "image"), (True, "image"), (True, "video")])
def test_a_caption_hears_after_it_has_seen(tiny, hears, kind):
    task = _tasks(tiny, f"tasks.caption.hears={str(hears).lower()}")["caption"]
    both = sample(kind, recording=toned("two"), recording_type="wav")
    (segment,), (seen,) = task.encode(both), task.encode(sample(kind))
    cells = _cells("two") if hears else 0
    assert np.count_nonzero(segment.modality == Modality.SPEECH) == cells == segment.length - seen.length
    if hears:
        vision = np.count_nonzero(seen.modality != Modality.TEXT)
        assert segment.recording.first == vision == np.flatnonzero(segment.modality == Modality.SPEECH)[0]


def test_queries_are_spoken_in_their_share_and_always_without_a_caption(tiny):
    for share, least, most in ((0.0, 0, 0), (0.5, 12, 28), (1.0, 40, 40)):
        task = _tasks(tiny, f"tasks.retrieval.spoken={share}")["retrieval"]
        texts = [task.encode(_heard(number=n, epoch=n % 3))[1] for n in range(40)]
        spoken = [segment for segment in texts if segment.recording is not None]
        assert least <= len(spoken) <= most
        assert all(segment.tokens[-1] == task.tokenizer.control("<embed>") for segment in texts)
    (media, query) = _tasks(tiny)["retrieval"].encode(_heard(text="", meta={}))
    assert query.recording is not None and media.pictures and media.pair == query.pair


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recording": b"not sound"}, "not a FLAC, WAV, MP3 or Opus file"),
        ({"recording": b""}, "not a FLAC, WAV, MP3 or Opus file"),
        ({"recording": toned("a" * 101)}, r"longer?.*4|more than data.speech_max_seconds = 4"),
        ({"recording": toned("ab")[:20]}, "recording cannot be decoded"),
    ],
)
def test_bad_recordings_are_bad_samples(tiny, changes, message):
    encode = Encoder(tuple(_tasks(tiny).values()))
    one = dataclasses.replace(_heard(meta={"captions": ["a"], "tasks": ["transcript"]}), **changes)
    with pytest.raises(DataError, match=message):
        encode(one)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("tasks.transcript.weight=1",), "tasks.transcript.weight = 1.0 .*needs a speech encoder"),
        (("tasks.retrieval.weight=1", "tasks.retrieval.spoken=0.5"), "tasks.retrieval.spoken = 0.5 .*needs a speech"),
        (("tasks.caption.hears=true",), "tasks.caption.hears = True .*needs a speech encoder"),
        ((*HEARS, "model.speech.heads=3"), "model.speech.width = 16 .*multiple of 4 x model.speech.heads = 12"),
        (
            (*HEARS, "data.speech_max_seconds=200"),
            "data.speech_max_seconds = 200.0 .*a recording must fit into one pack",
        ),
        ((*HEARS, "data.speech_max_seconds=100"), "data.speech_max_seconds = 100.0 .*gives 500 tokens a recording"),
        ((*HEARS, "tokenizer.vocab_size=321"), ""),
    ],
)
def test_recipes_that_cannot_hear(tiny, overrides, message):
    recipe = load_recipe(tiny.recipe, list(overrides))
    if message:
        with pytest.raises(ConfigError, match=message):
            check_recipe(recipe, 1, "tiny.toml")
    else:  # the symbols of speech are rows after the pieces
        with pytest.raises(ConfigError, match="set it to 322 or more"):
            Tokenizer.of(recipe)
