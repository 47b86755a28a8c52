"""Inspecting shards: sound ones pass, and every way of being unsound is named."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.inspect import describe, inspect
from data_tools.synthetic.generate import generate
from data_tools.tokenizer.train import train
from data_tools.writer import ShardWriter
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.drawing.contact_sheet import PAGE_WIDTH, Cell, contact_sheet
from dsmoe_vl.errors import DataError
from tests.support.datasets import clip
from tests.support.sound_files import recording, tones
from tests.support.tars import write_tar


def photo(size=(64, 48)):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


def write(folder, samples, **limits):
    """Shards of (key, media, media type, text, meta), and a recording if there is one."""
    with ShardWriter(folder, "train", **limits) as writer:
        for sample in samples:
            *sample, spoken = sample if len(sample) == 6 else (*sample, None)
            writer.write(*sample, recording=spoken, recording_type="flac")
    return folder


def problems(folder, **options):
    return {kind: len(places) for kind, places in inspect(folder, **options).problems.items()}


GOOD = [
    (f"p{i}", photo(), "png", f"a red photo number {i}", {"captions": [f"a red photo number {i}"]}) for i in range(6)
]


def test_sound_shards(tmp_path):
    generate(tmp_path, images=70, videos=5, eval_images=0, eval_videos=0)
    report = inspect(tmp_path / "images_train")
    assert (report.samples, report.shards, dict(report.media_types), dict(report.problems)) == (70, 1, {"jpg": 70}, {})
    assert set(report.sides) == {64} and len(report.lengths) >= 140 and 30 <= len(report.cells) <= 48
    report = inspect(tmp_path / "videos_train", limit=3)
    assert (report.samples, dict(report.media_types)) == (3, {"mp4": 3})
    assert [len(cell.pictures) for cell in report.cells] == [6, 6, 6]
    lines = list(describe(report))
    assert lines[0].startswith("3 samples read, 1 shards") and lines[-1] == "no problems"


def test_bad_samples_are_counted_by_reason(tmp_path):
    bad = [
        ("broken", photo()[:60], "png", "a caption", {"id": 1}),
        ("noise", b"\0" * 5000, "mp4", "a caption", {"id": 1}),
        ("mute", photo(), "png", " ", {"id": 1}),
        ("text", None, "", "a caption", {"id": 1}),
    ]
    found = inspect(write(tmp_path, GOOD + bad))
    assert {kind: len(places) for kind, places in found.problems.items()} == {
        "image cannot be decoded": 1,
        "video cannot be decoded": 1,
        "no caption": 1,
        "no image or video": 1,
    }
    assert found.problems["image cannot be decoded"][0].startswith("train-00000.tar, sample 6, broken: ")
    assert any(line.startswith("problem: 1 x image cannot be decoded") for line in describe(found))


def test_recordings(tmp_path):
    sound = recording("flac", tones(0.5))
    good = [
        ("both", photo(), "png", "a dog", {"captions": ["a dog", "dogs"], "speech_seconds": 0.5}, sound),
        ("alone", None, "", "words", {"transcript": "words", "speech_seconds": 0.5}, sound),
    ]
    report = inspect(write(tmp_path / "good", good + GOOD[:1]))
    assert not report.problems and (report.recordings, report.transcripts) == ({"flac": 2}, 1)
    assert report.media_types == {"png": 2, "recording only": 1} and report.tasks["transcript"] == 1
    lines = list(describe(report))
    assert "recordings: 2 flac; 1.0 s of speech, 1 transcripts" in lines
    assert not any("recordings" in line for line in describe(inspect(write(tmp_path / "without", GOOD))))

    long = recording("flac", np.zeros(31 * 16_000, np.float32))
    bad = [
        ("cut", photo(), "png", "a dog", {"id": 1}, sound[:5000]),
        ("long", photo(), "png", "a dog", {"id": 1}, long),
        ("wordless", None, "", "", {"captions": ["a dog", "dogs"]}, sound),
        ("mute", None, "", " ", {"id": 1}, sound),
        ("seconds", None, "", "words", {"speech_seconds": -1}, sound),
    ]
    assert problems(write(tmp_path / "bad", bad)) == {
        "recording cannot be decoded": 1,
        "recording too long": 1,
        "no transcript": 1,
        "no caption": 1,
        "no positive number": 1,
    }
    meta = {"schema_version": 1, "recording_sha256": "0" * 64}
    write_tar(tmp_path / "other" / "a.tar", [
        ("a.flac", sound), ("a.txt", b"words"), ("a.json", json.dumps(meta).encode()),
        ("b.wav", recording("wav")), ("b.flac", sound), ("b.txt", b"words"),
    ])  # fmt: skip
    assert problems(tmp_path / "other") == {
        "recording differs from the recording_sha256 in json": 1,
        "several recordings": 1,
        "no index.json": 1,
    }


def test_tars_of_others(tmp_path):
    write_tar(tmp_path / "a.tar", [
        ("one.png", photo()), ("one.txt", b"a caption"),
        ("two.png", photo()), ("two.json", b"{"),
        ("three.json", json.dumps({"sha256": "0" * 64}).encode()), ("three.png", photo()), ("three.txt", b"a"),
        ("one.png", photo()), ("one.txt", b"a caption"), ("one.json", b'{"a": 1}'),
    ])  # fmt: skip
    assert problems(tmp_path) == {
        "malformed text or JSON": 1,
        "duplicate key": 1,
    }
    assert any(line.startswith("3 samples of another tool") for line in describe(inspect(tmp_path)))
    (write(tmp_path / "ours", GOOD) / "index.json").unlink()
    assert problems(tmp_path / "ours") == {"no index.json": 1}


def test_json_that_training_could_not_use(tmp_path):
    good = {"captions": ["a"], "duration_seconds": 2.0, "saliency": [[0, 1], [0.5, 1]], "tasks": ["caption"]}
    bad = {
        "no positive number": {"duration_seconds": 0},
        "malformed saliency": {"saliency": [[0, 2]]},
        "malformed importance": {"importance": []},
        "unknown task": {"tasks": ["captions"]},
    }
    numbers = (10**400, -(10**400), True, "2", None, float("inf"), float("nan"), [1])  # json.loads reads all of them
    more = [(f"n{at}", photo(), "png", "a", good | {"width": value}) for at, value in enumerate(numbers)]
    samples = [(name, photo(), "png", "a", good | change) for name, change in bad.items()]
    samples += [one for one in more if one[4]["width"] is not None]
    folder = write(tmp_path, [("good", photo(), "png", "a", good), *samples])
    assert problems(folder) == dict.fromkeys(bad, 1) | {"no positive number": len(numbers)}
    assert inspect(folder).problems["no positive number"][0] == (
        "train-00000.tar, sample 1, no_positive_number-1330f8c9: duration_seconds is 0"
    )


def test_curves_of_others_are_checked_where_training_uses_them(tmp_path):
    film, bad = clip(tmp_path / "one.mp4").read_bytes(), json.dumps({"importance": [3], "duration_seconds": 1}).encode()
    write_tar(tmp_path / "a.tar", [
        ("one.mp4", film), ("one.txt", b"a caption"), ("one.json", bad),
        ("two.png", photo()), ("two.txt", b"a caption"), ("two.json", bad),
    ])  # fmt: skip
    assert problems(tmp_path) == {"malformed importance": 1}


def test_length_in_tokens(tmp_path):
    folder = write(tmp_path, GOOD)
    train([folder], tmp_path / "t.model", vocab_size=300)
    report = inspect(folder, tokenizer=Tokenizer(tmp_path / "t.model"))
    assert all(length > 5 for length in report.lengths)
    assert any(line.startswith("caption length, tokens") for line in describe(report))


def test_shards_that_are_not_those_of_the_manifest(tmp_path):
    folder = write(tmp_path, GOOD, samples_per_shard=2)
    assert problems(folder) == {}
    first = folder / "train-00000.tar"
    data = first.read_bytes()
    first.write_bytes(data[:2048].replace(b"a red", b"a bad") + data[2048:])
    (folder / "train-00001.tar").rename(folder / "other.tar")
    last = folder / "train-00002.tar"
    last.write_bytes(last.read_bytes()[:3000])
    found = problems(folder)
    assert found.pop("damaged shard") == 1
    assert found == {
        "missing shard": 1,
        "unlisted shard": 1,
        "samples differ from index.json": 1,
        "bytes differ from index.json": 1,
        "sha256 differ from index.json": 2,
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"shards": [{"name": "a"}]}', '{"shards": 3}'])
def test_a_manifest_that_is_none(tmp_path, content):
    (write(tmp_path, GOOD) / "index.json").write_text(content)
    assert problems(tmp_path) == {"malformed index.json": 1}


def test_nothing_to_inspect(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        inspect(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no \*.tar"):
        inspect(tmp_path)
    with pytest.raises(DataError, match="--limit 0"):
        inspect(write(tmp_path, GOOD), limit=0)


def test_contact_sheet_shows_every_cell():
    cells = [Cell([Image.new("RGB", (64, 64), (i, 0, 0))], "a caption of some words") for i in range(20)]
    cells += [Cell([Image.new("RGB", (640, 480), (0, 200, i)) for i in range(6)], "word " * 60)]
    cells += [
        Cell([Image.new("RGB", (3, 900), (0, 0, 100))], "x" * 500),
        Cell([Image.new("RGB", (900, 3), (9, 9, 9))], ""),
    ]
    page = contact_sheet(cells)
    assert page.width == PAGE_WIDTH
    colours = {colour for _, colour in page.getcolors(maxcolors=2**20)}
    assert {picture.getpixel((0, 0)) for cell in cells for picture in cell.pictures} <= colours
