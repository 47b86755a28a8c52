"""One answer to what a sample gives: inspection, tokenizer, training and evaluation agree, and say what they leave."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from data_tools.inspect import inspect
from data_tools.tokenizer.train import train as train_tokenizer
from dsmoe_vl.config.model import VisionConfig
from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.config.task_table import TASKS, CaptionConfig
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.summaries import _reference
from dsmoe_vl.tasks.caption import CaptionTask, chosen_caption
from dsmoe_vl.tasks.media import MediaReader
from tests.support.loading import DATA
from tests.support.sound_files import recording
from tests.support.tars import encoded_as, picture, write_tar

DOG = "a dog on the grass"
PHOTO = encoded_as(picture(), "PNG")
BOM = b"\xef\xbb\xbf"


def sample(text="", media=PHOTO, **meta):
    return Sample("k", SourceConfig("photos"), 0, media, "png" if media else "", text, meta)


def shard(folder, text=None, meta=None, count=1):
    """`count` equal samples, each of its own key; `text` and `meta` are the bytes of KEY.txt and KEY.json."""
    members = []
    for i in range(count):
        members.append((f"k{i}.png", PHOTO))
        members += [(f"k{i}.txt", text)] if text is not None else []
        members += [(f"k{i}.json", meta)] if meta is not None else []
    write_tar(folder / "a.tar", members)
    return folder


def found(folder):
    """Problems by kind, without their places."""
    return {kind: len(places) for kind, places in inspect(folder).problems.items()}


def reason(action):
    with pytest.raises(DataError) as error:
        action()
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "meta", "captions"),
    [
        (None, {"captions": [DOG]}, [DOG]),
        (None, {"captions": DOG}, [DOG]),
        (None, {"caption": DOG}, [DOG]),
        (None, {"caption": [DOG, "a cat"]}, [DOG, "a cat"]),
        (DOG, None, [DOG]),
        (f" {DOG}\n", {}, [DOG]),
        ("a cat", {"captions": [DOG], "caption": "a bird"}, [DOG]),
        ("a cat", {"caption": DOG}, [DOG]),
        ("a cat", {"captions": None, "caption": None}, ["a cat"]),
        ("a cat", {"captions": [], "caption": []}, ["a cat"]),
        ("a cat", {"captions": [], "caption": DOG}, [DOG]),
        ("a cat", {"captions": ["", " "]}, ["a cat"]),
        (None, {"captions": [None, f"{DOG} ", 3]}, [DOG]),
        (BOM.decode() + DOG, {}, [DOG]),
        (2 * BOM.decode() + DOG, {}, [DOG]),
        (None, {"captions": [BOM.decode() + DOG]}, [DOG]),
        (None, {"caption": f"{BOM.decode()}a dog on {BOM.decode()}the grass "}, [DOG]),
        ("a cat", {"captions": ["\0", "\u200b\u200b", "\ufeff", "\u202e \x1b\t"]}, ["a cat"]),
    ],
)
def test_every_reader_finds_the_same_captions(tmp_path, text, meta, captions):
    folder = shard(
        tmp_path / "s", None if text is None else text.encode(), None if meta is None else json.dumps(meta).encode(), 40
    )
    (first, *_) = iterate_samples(SourceConfig.at(folder))
    assert contents_of(first).captions == tuple(captions)
    assert contents_of(first).tasks == ("caption", "retrieval")
    epochs = (
        Sample(first.key, SourceConfig(), epoch, PHOTO, "png", first.text, first.meta) for epoch in range(len(captions))
    )
    assert {chosen_caption(one) for one in epochs} == set(captions)
    report = inspect(folder)
    assert report.lengths == [len(caption.split()) for caption in captions] * 40
    assert report.tasks == {"caption": 40, "retrieval": 40}
    tokenizer = train_tokenizer([folder], tmp_path / "t.model")
    assert [len(tokenizer.encode(caption)) for caption in captions] == [
        {DOG: 5, "a cat": 2}[caption] for caption in captions
    ]


@pytest.mark.parametrize(
    ("media", "meta", "transcript", "tasks", "problems"),
    [
        (None, {"transcript": f" {DOG}\n"}, DOG, ("transcript",), []),
        (None, {"captions": [DOG]}, DOG, ("transcript",), []),
        (PHOTO, {"captions": [DOG]}, DOG, ("caption", "retrieval", "transcript"), []),
        (PHOTO, {"captions": [DOG, "a cat"]}, "", ("caption", "retrieval"), []),
        (PHOTO, {"captions": [DOG, "a cat"], "transcript": DOG}, DOG, ("caption", "retrieval", "transcript"), []),
        (PHOTO, {}, "", ("retrieval",), []),
        (PHOTO, {"transcript": " "}, "", ("retrieval",), []),
        (None, {"transcript": ["a", "list"]}, "", (), ["no caption"]),
        (None, {"captions": [DOG, "a cat"]}, "", (), ["no transcript"]),
        (None, {"captions": [DOG, "a cat"], "transcript": " "}, "", (), ["no transcript"]),
        (None, {}, "", (), ["no caption"]),
    ],
)
def test_the_words_of_a_recording(media, meta, transcript, tasks, problems):
    contents = contents_of(replace(sample(media=media, **meta), recording=b"speech", recording_type="flac"))
    assert (contents.transcript, contents.tasks) == (transcript, tasks)
    assert [problem.partition(":")[0] for problem in contents.problems] == problems
    assert bool(contents.no_transcript) == (not transcript)
    silent = contents_of(sample(media=media, **meta))
    assert silent.transcript == "" and "transcript" not in silent.tasks and silent.no_recording == "no recording"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("place", ["txt", "json"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding, place):
    folder = shard(tmp_path, **{"text": DOG.encode(encoding)} if place == "txt" else {
        "meta": json.dumps({"captions": [DOG]}).encode(encoding)
    })  # fmt: skip
    (one,) = iterate_samples(SourceConfig.at(folder))
    assert contents_of(one).captions == (DOG,) and found(folder) == {}


@pytest.mark.parametrize(
    ("text", "meta", "message"),
    [
        ("", {}, "no caption: no text in `captions` or `caption` of KEY.json, nor in KEY.txt"),
        (" \n", {"captions": []}, "no caption: no text in `captions` or `caption` of KEY.json, nor in KEY.txt"),
        ("", {"captions": 3}, "no caption: 1 of 1 entries of `captions` in KEY.json have no text, such as 3"),
        ("", {"captions": {"en": DOG}},
         "no caption: 1 of 1 entries of `captions` in KEY.json have no text, such as {'en': 'a dog on the grass'}"),
        ("", {"captions": [None, ""], "caption": " "},
         "no caption: 2 of 2 entries of `captions` in KEY.json have no text, such as null; "
         "1 of 1 entries of `caption` in KEY.json have no text, such as ' '"),
        ("", {"captions": [[DOG]]},
         "no caption: 1 of 1 entries of `captions` in KEY.json have no text, such as ['a dog on the grass']"),
    ],
)  # fmt: skip
def test_no_caption_has_one_reason_everywhere(task, tmp_path, text, meta, message):
    folder = shard(tmp_path / "s", text.encode(), json.dumps(meta).encode())
    (one,) = iterate_samples(SourceConfig.at(folder))
    message += "; k0 has the files k0.png, k0.txt, k0.json"
    assert reason(lambda: task.encode(one)) == message
    kind, _, detail = message.partition(": ")
    assert dict(inspect(folder).problems) == {kind: [f"a.tar, sample 0, k0: {detail}"]}
    assert detail in reason(lambda: train_tokenizer([folder], tmp_path / "t.model"))
    quarantine = tmp_path / "quarantine.jsonl"
    assert message in reason(lambda: next(iter(loader(folder, task.encode, quarantine, max_bad_fraction=0.0))))
    assert json.loads(quarantine.read_text().splitlines()[0])["reason"] == message


@pytest.fixture(scope="module")
def task(tiny):
    pictures = MediaReader(DataConfig(image_max_patches=4), VisionConfig(patch_size=16, merge=2))
    return CaptionTask(pictures, Tokenizer(tiny.data / "tokenizer.model"), CaptionConfig())


def loader(folder, encode, quarantine=None, **changes):
    data = DataConfig(**{**vars(DATA), **changes})
    return Loader(data, (SourceConfig("photos", str(folder)),), encode, 16, 2, 1, 0, 1, 1, 1, quarantine)


def test_entries_without_text_are_counted_everywhere(task, tmp_path, capsys):
    """A sample with one usable caption is used; what is left out of it is not passed over."""
    meta = {"captions": [None, DOG, "", 3], "summary": ["a list"]}
    folder = shard(tmp_path / "s", meta=json.dumps(meta).encode(), count=8)
    assert found(folder) == {"entries without text": 8, "no summary": 8}
    assert inspect(folder).problems["entries without text"][0] == (
        "a.tar, sample 0, k0: 3 of 4 entries of `captions` in KEY.json have no text, such as null"
    )
    assert inspect(folder).problems["no summary"][0] == "a.tar, sample 0, k0: `summary` in KEY.json is ['a list']"
    capsys.readouterr()
    train_tokenizer([folder], tmp_path / "t.model")
    assert "not used: 8 x entries without text, the first in k0: 3 of 4 entries" in capsys.readouterr().out
    reading = loader(folder, task.encode)
    next(iter(reading))
    report = reading.report()
    assert report["photos/errors"] == 0
    assert report["photos/flaws/entries without text"] == report["photos/samples"] > 0


def test_recordings_that_a_model_cannot_hear_are_counted(task, tmp_path):
    of_sample = (("png", PHOTO), ("txt", DOG.encode()), ("flac", recording()))
    write_tar(tmp_path / "s/a.tar", [(f"k{i}.{kind}", content) for i in range(8) for kind, content in of_sample])
    reading = loader(tmp_path / "s", task.encode)
    next(iter(reading))
    report = reading.report()
    assert report["photos/errors"] == 0
    assert report["photos/flaws/recordings not used"] == report["photos/samples"] > 0


def test_a_summary_that_is_no_text_is_no_reference():
    assert [_reference(sample(summary=value)) for value in (None, ["a"], 3, " a dog ")] == ["", "", "", "a dog"]


@pytest.mark.parametrize(
    ("changes", "tasks", "kinds"),
    [
        ({"text": DOG}, ("caption", "retrieval"), []),
        ({"text": DOG, "tasks": ["retrieval"]}, ("retrieval",), []),
        ({"text": DOG, "tasks": "retrieval"}, ("retrieval",), []),
        ({"text": DOG, "tasks": None}, ("caption", "retrieval"), []),
        ({"text": DOG, "tasks": ["else"]}, (), ["unknown task"]),
        ({"text": DOG, "tasks": ["else", "caption"]}, ("caption",), ["unknown task"]),
        ({"text": DOG, "tasks": "captions"}, (), ["unknown task"]),
        ({"text": DOG, "tasks": {"caption": 1}}, (), ["unknown task"]),
        ({"text": DOG, "tasks": [["caption"]]}, (), ["unknown task"]),
        ({"text": DOG, "tasks": []}, (), ["no task"]),
        ({"text": DOG, "tasks": ["summary"]}, (), ["no task"]),
        ({"text": DOG, "media": None}, (), ["no image or video"]),
        ({"media": None}, (), ["no image or video", "no caption"]),
        ({"media": None, "summary": "a film"}, (), ["no image or video"]),
        ({"summary": "a film"}, (), []),
        ({}, (), ["no caption"]),
    ],
)
def test_usable_tasks_and_problems(changes, tasks, kinds):
    contents = contents_of(sample(**changes))
    assert contents.tasks == tasks
    assert [problem.partition(":")[0] for problem in contents.problems] == kinds


def test_random_metadata(tmp_path):
    """Whatever KEY.json and KEY.txt say, all readers agree, and every entry is either used or counted."""
    rng = np.random.default_rng(0)
    values = [
        None,
        True,
        0,
        1.5,
        "",
        " ",
        "\ufeff",
        "a",
        " b\n",
        "\ud800",
        {},
        {"a": 1},
        [],
        [[]],
        "x" * 100,
        [None, "c"],
    ]

    def value(depth=0):
        if depth < 2 and rng.random() < 0.4:
            return [value(depth + 1) for _ in range(rng.integers(4))]
        return values[rng.integers(len(values))]

    for _ in range(600):
        names = [name for name in ("captions", "caption", "summary", "tasks", "saliency") if rng.random() < 0.5]
        meta = {name: value() for name in names}
        if rng.random() < 0.5:
            meta["tasks"] = [spec.name for spec in TASKS if rng.random() < 0.5]
        one = sample(str(rng.choice(["", " ", DOG])), PHOTO if rng.random() < 0.8 else None, **meta)
        contents = contents_of(one)
        assert all(isinstance(text, str) and text == text.strip() != "" for text in contents.texts)
        assert bool(contents.captions) != bool(contents.no_caption)
        assert bool(contents.summary) != bool(contents.no_summary)
        assert not (set(contents.tasks) - {spec.name for spec in TASKS}) and (one.media or not contents.tasks)
        try:
            assert chosen_caption(one) in contents.captions
        except DataError as error:
            assert str(error) == DataError(contents.no_caption).args[0] or "\\ud800" in str(error)
        place = next((name for name in ("captions", "caption") if contents.captions and meta.get(name) is not None
                      and any(isinstance(x, str) and x.strip("\ufeff \n") for x in
                              (meta[name] if isinstance(meta[name], list) else [meta[name]]))), None)  # fmt: skip
        if place is not None:
            entries = meta[place] if isinstance(meta[place], list) else [meta[place]]
            left = len(entries) - len(contents.captions)
            flaws = [flaw for flaw in contents.flaws if f"of `{place}` in" in flaw]
            assert len(flaws) == bool(left) and all(f": {left} of {len(entries)} entries" in flaw for flaw in flaws)
        elif contents.captions:
            assert contents.captions == (DOG,)
