"""Tars of other tools: conversion uses, refuses and notes what inspection and training do, in the same words."""

from __future__ import annotations

import json

import pytest

from data_tools.convert import main
from data_tools.formats import img2dataset
from data_tools.inspect import inspect
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.shards.index import iterate_samples
from tests.support.datasets import read
from tests.support.sound_files import recording
from tests.support.tars import encoded_as, picture, write_tar

JPEG, PNG, GIF = (encoded_as(picture(), kind) for kind in ("JPEG", "PNG", "GIF"))
TEXT = b"a dog on the grass"


def meta(**values):
    return json.dumps(values).encode()


def rejected(folder):
    return [record.problem for record in read(img2dataset, "--shards", folder) if record.problem]


REFUSED = {
    "dots in keys": [("1.05.jpg", JPEG), ("1.05.txt", TEXT)],
    "dates": [("2024-01-01 10.11.jpg", JPEG), ("2024-01-01 10.11.txt", TEXT)],
    "compressed twice": [("a.jpg", JPEG), ("a.txt.gz", TEXT)],
    "another column": [("a.jpg", JPEG), ("a.json", meta(text="a dog"))],
    "objects": [("a.jpg", JPEG), ("a.json", meta(captions={"en": "a dog"}))],
    "nothing to see": [("a.jpg", JPEG), ("a.txt", b"\0"), ("a.json", meta(captions=["\u200b", ""]))],
    "no media": [("a.txt", TEXT), ("a.json", meta(url="http://x"))],
    "folders": [("a/image.jpg", JPEG), ("a/caption.txt", TEXT)],
    "two captions of a recording": [("a.flac", recording()), ("a.json", meta(captions=["x", "y"]))],
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "two captions of a recording"])
def test_the_reason_is_that_of_inspection(tmp_path, name):
    path = write_tar(tmp_path / "x.tar", REFUSED[name])
    problems = inspect(tmp_path).problems
    sample = next(iter(iterate_samples(SourceConfig.at(tmp_path))))
    for problem in rejected(tmp_path):
        kind, _, detail = problem.partition(": ")
        place, _, detail = detail.partition(": ")
        assert place == str(path) and "has the files" in detail
        if name not in ("dots in keys", "dates"):  # their pictures are found by content, so only the caption is missing
            assert problems[kind][0].endswith(detail)
        else:
            assert contents_of(sample).no_caption == f"{kind}: {detail}" and "put no other dot into names" in detail


def test_of_pictures_before_all_texts_each_half_has_its_reason(tmp_path):
    names = ("0001", "0002", "0003")
    write_tar(tmp_path / "x.tar", [(f"{n}.jpg", JPEG) for n in names] + [(f"{n}.txt", TEXT) for n in names])
    found = rejected(tmp_path)
    assert [problem.partition(":")[0] for problem in found] == ["no caption"] * 3 + ["no image or video"] * 3
    assert all("files of one sample must follow each other in the tar" in problem for problem in found)


def test_names_that_belong_to_no_sample(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("1", JPEG), ("2", TEXT)])
    (problem,) = rejected(tmp_path)
    assert problem == f"no samples: {path}: 1 belongs to none; a name is KEY.EXTENSION, the key up to the first dot"


@pytest.mark.parametrize(
    "files",
    [
        [("a.txt", TEXT)],
        [("a.txt", b"a cat"), ("a.json", meta(caption="a dog"))],
        [("a.txt", b"a cat"), ("a.json", meta(captions=["a dog", "a puppy"]))],
        [("a.json", meta(captions="a dog"))],
        [("a.json", meta(captions=["a dog", None, "a puppy"]))],
        [("a.json", meta(caption=["a dog", "a puppy"]))],
        [("a.json", meta(captions=[], caption="a dog"))],
        [("a.txt", b"\xef\xbb\xbfa dog"), ("a.json", meta(captions=["\ufeff"]))],
    ],
)
def test_the_captions_are_those_of_training(tmp_path, files):
    write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), *files])
    (sample,) = iterate_samples(SourceConfig.at(tmp_path))
    (record,) = read(img2dataset, "--shards", tmp_path)
    assert record.problem == "" and tuple(record.captions) == contents_of(sample).captions != ()


def test_what_is_passed_over_is_noted(tmp_path, capsys):
    members = [
        ("a.jpg", JPEG), ("a.png", PNG), ("a.txt", TEXT),
        ("b.png", PNG), ("b.gif", GIF), ("b.json", meta(captions=["a dog", 3], tasks="else", summary=1)),
        ("c.gif", GIF), ("c.bmp", encoded_as(picture(), "BMP")), ("c.txt", TEXT),
        ("d.jpg", JPEG), ("d.txt", TEXT),
    ]  # fmt: skip
    write_tar(tmp_path / "in" / "x.tar", members)
    arguments = ["img2dataset", "--shards", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "2 several images or videos, 1 entries without text, 1 GIF stored as PNG" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "notes.jsonl").read_text().splitlines()]
    assert [(row["id"], row.get("detail")) for row in rows] == [
        ("x-a", "a.jpg, a.png; only a.jpg is used"),
        ("x-b", "1 of 2 entries of `captions` in KEY.json have no text, such as 3"),
        ("x-c", None),
        ("x-c", "c.gif, c.bmp; only c.gif is used"),
    ]
    samples = iterate_samples(SourceConfig.at(tmp_path / "out"))
    assert [sample.media for sample in samples if sample.media_type == "jpg"] == [JPEG, JPEG]


def test_recordings(tmp_path):
    flac, words = recording(), meta(captions=["a dog", "a cat"], transcript="  a dog\nbarks")
    members = [
        ("a.jpg", JPEG), ("a.flac", flac), ("a.txt", TEXT),
        ("b.flac", flac), ("b.txt", TEXT),
        ("c.flac", flac), ("c.json", words),
        ("d.jpg", JPEG), ("d.flac", flac),
    ]  # fmt: skip
    write_tar(tmp_path / "in" / "x.tar", members)
    write_tar(tmp_path / "in" / "y.tar", REFUSED["two captions of a recording"])
    arguments = ["img2dataset", "--shards", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--max-rejected", "0.3"]) == 0
    given = list(iterate_samples(SourceConfig.at(tmp_path / "in")))
    before = {sample.key: contents_of(sample) for sample in given[:4]}
    for sample in iterate_samples(SourceConfig.at(tmp_path / "out")):
        ours, theirs = contents_of(sample), before[sample.key.removeprefix("x-")]
        assert sample.recording == flac and ours.tasks == theirs.tasks and ours.captions == theirs.captions
        assert ours.transcript == " ".join(theirs.transcript.split())
    assert '"reason": "no transcript"' in (tmp_path / "out" / "rejected.jsonl").read_text()
