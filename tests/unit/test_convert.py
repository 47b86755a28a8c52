"""Converting raw datasets: original bytes in, unusable records out with a reason, and clear errors."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_tools import convert as tool
from data_tools.check import TOO_MANY_BYTES, Reencoding, check, size_notes
from data_tools.convert import FORMATS
from data_tools.formats import Record
from data_tools.inspect import inspect
from data_tools.parts import Settings
from data_tools.synthetic.films import encode_mp4
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import DataError

FORMAT = {module.NAME: module for module in FORMATS}


def picture(mode="RGB", size=(40, 30), kind="JPEG", **options):
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(file, kind, **options)
    return file.getvalue()


def records(name, *options):
    parser = argparse.ArgumentParser()
    FORMAT[name].add_arguments(parser)
    return FORMAT[name].records(parser.parse_args([str(option) for option in options]))


def convert(found, source, output, max_rejected=0.1, workers=1, **settings):
    return tool.convert(found, output, Settings(source, **settings), max_rejected, workers)


def coco(folder, photos, captions, **extra):
    """A COCO dataset from {file name: bytes or None} and [(image number, caption)]."""
    (folder / "photos").mkdir()
    for name, data in photos.items():
        if data is not None:
            (folder / "photos" / name).write_bytes(data)
    images = [
        {"id": i, "file_name": name, "license": 4, "flickr_url": f"http://x/{i}"} for i, name in enumerate(photos)
    ]
    rows = [{"image_id": image, "caption": caption, "id": i} for i, (image, caption) in enumerate(captions)]
    content = {"licenses": [{"id": 4, "url": "http://cc"}], "images": images, "annotations": rows, **extra}
    (folder / "captions.json").write_text(json.dumps(content))
    return records("coco", "--images", folder / "photos", "--annotations", folder / "captions.json")


def reasons(folder):
    return {row["id"]: row["reason"] for row in map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())}


def test_coco_photos_arrive_with_their_bytes_and_all_captions(shared_data, tmp_path):
    for split in ("train", "val"):
        annotations = shared_data / "coco_cc_by" / "annotations" / f"captions_{split}2017.json"
        photos = shared_data / "coco_cc_by" / f"{split}2017"
        found = records("coco", "--images", photos, "--annotations", annotations)
        outcome = convert(found, "coco", tmp_path / split, split=split, samples_per_shard=10, workers=2)
        content = json.loads(annotations.read_text())
        assert outcome.written == len(content["images"]) == len(list(photos.iterdir())) and not outcome.reasons
        for sample, image in zip(iterate_samples(SourceConfig.at(tmp_path / split)), content["images"], strict=True):
            assert sample.media == (photos / image["file_name"]).read_bytes() and sample.media_type == "jpg"
            theirs = [
                " ".join(row["caption"].split()) for row in content["annotations"] if row["image_id"] == image["id"]
            ]
            assert sample.meta["captions"] == theirs and len(theirs) >= 5
            assert sample.text == theirs[0]
            assert (sample.meta["width"], sample.meta["height"]) == (image["width"], image["height"])
            assert sample.meta["sha256"] == hashlib.sha256(sample.media).hexdigest()
            assert sample.meta["url"] == image["flickr_url"] and "creativecommons" in sample.meta["licence"]
            assert (sample.key, sample.meta["split"], sample.meta["source"]) == (str(image["id"]), split, "coco")


def test_captions_without_photos_are_rejected(shared_data, tmp_path):
    annotations = shared_data / "coco_text_only" / "annotations" / "captions_val2017.json"
    found = records("coco", "--images", tmp_path, "--annotations", annotations)
    with pytest.raises(DataError, match=r"no record could be used .*4779 missing file"):
        convert(found, "coco", tmp_path / "shards", max_rejected=1.0)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["rejected.jsonl"]
    assert len(reasons(tmp_path / "shards")) == 4779


def test_every_kind_of_bad_record_is_listed_with_its_reason(tmp_path):
    photos = {
        "good.jpg": picture(),
        "missing.jpg": None,
        "cut.jpg": picture(size=(200, 200))[:-3000],
        "empty.jpg": b"",
        "moving.gif": picture("P", kind="GIF")[:20],
        "uncaptioned.jpg": picture(),
        "blank.jpg": picture(),
    }
    captions = [(i, "a photo") for i in (0, 1, 2, 3, 4)] + [(6, " \n"), (6, None), (99, "of what?")]
    outcome = convert(coco(tmp_path, photos, captions), "coco", tmp_path / "shards", max_rejected=1.0, workers=3)
    assert outcome.written == 1
    assert reasons(tmp_path / "shards") == {
        "1": "missing file",
        "2": "unreadable image",
        "3": "unreadable image",
        "4": "unreadable image",
        "5": "empty caption",
        "6": "empty caption",
        "99": "unlisted file",
    }
    assert outcome.reasons.total() == 7


def test_unusual_photos_are_kept_as_they_are(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    photos = {
        "grey.jpg": picture("L"),
        "cmyk.jpg": picture("CMYK"),
        "really_a_png.jpg": picture("RGBA", kind="PNG"),
        "modern.webp": picture(kind="WEBP"),
        "turned.jpg": picture(exif=turned),
    }
    captions = [(i, f"photo {i}\n") for i in range(5)]
    convert(coco(tmp_path, photos, captions), "coco", tmp_path / "shards")
    samples = list(iterate_samples(SourceConfig.at(tmp_path / "shards")))
    assert [sample.media for sample in samples] == list(photos.values())
    assert [sample.media_type for sample in samples] == ["jpg", "jpg", "png", "webp", "jpg"]
    assert [sample.text for sample in samples] == [f"photo {i}" for i in range(5)]
    assert [(sample.meta["width"], sample.meta["height"]) for sample in samples] == [(40, 30)] * 4 + [(30, 40)]


def test_workers_do_not_change_the_output(tmp_path):
    photos = {f"{i}.jpg": picture(size=(20 + i, 20)) if i % 5 else None for i in range(30)}
    found = list(coco(tmp_path, photos, [(i, f"photo {i}") for i in range(30)]))
    for workers in (1, 4):
        convert(found, "coco", tmp_path / str(workers), samples_per_shard=7, max_rejected=0.5, workers=workers)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "4" / path.name).read_bytes()


def test_text_that_is_not_unicode(tmp_path):
    photos = {"good.jpg": picture(), "nul\0.jpg": None, "half\ud83d.jpg": None}
    captions = [(0, "a half \ud83d emoji"), (1, "a"), (2, "a")]
    convert(coco(tmp_path, photos, captions), "coco", tmp_path / "shards", max_rejected=1.0)
    (sample,) = iterate_samples(SourceConfig.at(tmp_path / "shards"))
    assert sample.text == sample.meta["captions"][0] == "a half ? emoji"
    assert set(reasons(tmp_path / "shards").values()) == {"unreadable file"}


def test_what_training_refuses_for_its_size_is_noted(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    for name in "ab":
        (media / f"{name}.png").write_bytes(picture(kind="PNG"))
        (media / f"{name}.txt").write_text("a dog\n" * 1_600_000 if name == "b" else "a dog")
    convert(records("folder", "--media", media), "folder", tmp_path / "s")
    (row,) = map(json.loads, (tmp_path / "s" / "notes.jsonl").read_text().splitlines())
    assert row == {"id": "b.png", "note": TOO_MANY_BYTES[1]}
    (problem,) = inspect(tmp_path / "s").problems["file too large"]
    assert "b_png" in problem and ".json: " in problem


@pytest.mark.parametrize(
    ("sizes", "notes"),
    [
        ({"jpg": 2**20, "txt": 9, "json": 9}, ()),
        ({"jpg": 2**40, "txt": 9, "json": 9}, TOO_MANY_BYTES[:1]),
        ({"flac": 2**40, "mp4": 2**40}, TOO_MANY_BYTES[:1]),
        ({"mp4": 2**20, "txt": 2**24, "json": 2**24}, TOO_MANY_BYTES[1:]),
        ({"mp4": 2**40, "json": 2**24}, TOO_MANY_BYTES),
    ],
)
def test_notes_on_sizes(sizes, notes):
    assert size_notes(sizes) == notes


@pytest.mark.parametrize("text", ["\0", "\u200b", "\ufeff \n", "\u202e"])
def test_texts_without_anything_to_see(tmp_path, text):
    found = [
        Record("a", "image", None, [text, f"\ufeff a\n{text}dog "]),
        Record("b", "image", None, [text]),
        Record("c", "video", None, [], {"summary": text}),
        Record("d", "image", None, [], {"transcript": text}),
    ]
    path = tmp_path / "a.jpg"
    path.write_bytes(picture())
    first, *others = (check(replace(record, media=path), "test", Reencoding()) for record in found)
    assert [one.reason for one in others] == ["empty caption"] * 3
    assert len(first.meta["captions"]) == 1 and not first.text.startswith("\ufeff")


def test_the_budget_of_rejects(tmp_path):
    photos = {"a.jpg": picture(), "b.jpg": None, "c.jpg": picture()}
    found = list(coco(tmp_path, photos, [(i, "a photo") for i in range(3)]))
    with pytest.raises(DataError, match=r"1 of 3 records .*33.3% is more than --max-rejected 0.1"):
        convert(found, "coco", tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("*.tar*"))
    assert convert(found, "coco", tmp_path / "shards", max_rejected=0.4).written == 2


def test_an_identifier_that_occurs_twice(tmp_path):
    twice = [{"id": 7, "file_name": "a.jpg"}, {"id": 7, "file_name": "a.jpg"}]
    found = coco(tmp_path, {"a.jpg": picture()}, [(7, "one"), (7, "two")], images=twice)
    with pytest.raises(DataError, match="identifiers must be unique"):
        convert(found, "coco", tmp_path / "shards", max_rejected=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "a JSON object is expected"),
        (b'{"images": []}', "'annotations'"),
        (b'{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', r"'caption'.*instances_"),
        (b'{"images": [{"id": 1}], "annotations": []}', "'file_name'"),
        (b'{"images": ["a.jpg"], "annotations": []}', "not a COCO caption file"),
        (b'{"images": [], "annotations": []}', "no records: the annotations name no image or video"),
    ],
)
def test_files_that_are_not_coco_captions(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert(
            records("coco", "--images", tmp_path, "--annotations", tmp_path / "a.json"), "coco", tmp_path / "shards"
        )


def test_missing_paths(tmp_path):
    with pytest.raises(DataError, match=r"--annotations .*gone.json: No such file"):
        list(records("coco", "--images", tmp_path, "--annotations", tmp_path / "gone.json"))
    with pytest.raises(DataError, match=r"--images .*gone: no such folder"):
        list(records("coco", "--images", tmp_path / "gone", "--annotations", tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"--media .*gone: no such folder"):
        list(records("folder", "--media", tmp_path / "gone", "--table", tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"--table .*gone.csv: No such file"):
        list(records("folder", "--media", tmp_path, "--table", tmp_path / "gone.csv"))


def test_real_videos_with_no_frame_count_in_their_headers(shared_data, tmp_path):
    folder = shared_data / "videos_intel"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".mkv", ".mp4"))
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "label"])
        writer.writerows([name, f"this is {name}"] for name in names)
    columns = ("--map", "file=clip", "--map", "text=label")
    found = records("folder", "--media", folder, "--table", tmp_path / "texts.csv", *columns)
    outcome = convert(found, "folder", tmp_path / "shards", max_rejected=0)
    assert outcome.written == len(names) == 11
    for name, sample in zip(names, iterate_samples(SourceConfig.at(tmp_path / "shards")), strict=True):
        assert sample.media == (folder / name).read_bytes()
        assert (sample.meta["id"], sample.text) == (name, f"this is {name}")
        if name.endswith("mkv"):
            assert (sample.meta["width"], sample.meta["height"], sample.meta["fps"]) == (640, 480, 30)
            assert 1.5 <= sample.meta["duration_seconds"] <= 3.7
        else:
            assert (sample.meta["fps"], round(sample.meta["duration_seconds"])) == (12.5, 30)


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    whole = encode_mp4([Image.fromarray(np.full((32, 48, 3), 10 * i, np.uint8)) for i in range(10)])
    (folder / "a.mp4").write_bytes(whole)
    (folder / "sub" / "b b.mp4").write_bytes(whole)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "song.mp3").write_bytes(b"ID3")
    return folder


CSV = '\ufefffile, text\r\na.mp4,"one, two"\r\nsub/b b.mp4,second\r\na.mp4,three\r\n'
JSONL = '{"file": "a.mp4", "text": ["one, two", "three"]}\n\n{"file": "sub/b b.mp4", "text": "second", "more": 1}\n'


@pytest.mark.parametrize(("name", "content"), [("texts.csv", CSV), ("texts.jsonl", JSONL)])
def test_rows_of_one_video_are_its_captions(clips, tmp_path, name, content):
    (tmp_path / name).write_text(content, newline="")
    found = records("folder", "--media", clips, "--table", tmp_path / name)
    convert(found, "folder", tmp_path / "shards", max_rejected=0)
    first, second = iterate_samples(SourceConfig.at(tmp_path / "shards"))
    assert first.meta["captions"] == ["one, two", "three"] and second.meta["captions"] == ["second"]
    assert (first.meta["fps"], first.meta["duration_seconds"]) == (8, 1.25)
    assert (first.meta["width"], first.meta["height"]) == (48, 32)


def test_importance_is_looked_at(clips, tmp_path):
    curves = {"a.mp4": [0, 0.5, 1], "b.mp4": [0, 2], "c.mp4": [], "d.mp4": ["a", 1], "e.mp4": None}
    rows = []
    for name, curve in curves.items():
        if name != "a.mp4":
            shutil.copy(clips / "a.mp4", clips / name)
        rows.append({"file": name, "text": name, "importance": curve})
    rows.append({"file": "sub/b b.mp4", "text": "x", "saliency": [[0, 1], [0, 1, 1]]})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = records("folder", "--media", clips, "--table", tmp_path / "t.jsonl")
    convert(found, "folder", tmp_path / "shards", max_rejected=1.0)
    bad = dict.fromkeys(("b.mp4", "c.mp4", "d.mp4"), "malformed importance")
    assert reasons(tmp_path / "shards") == {**bad, "sub/b b.mp4": "malformed saliency"}


def test_bad_videos_are_listed_with_their_reason(clips, tmp_path):
    rows = [("a.mp4", "good"), ("cut.mp4", "cut"), ("song.mp3", "song"), ("gone.mp4", "gone"), ("sub", "a folder"),
            ("sub/b b.mp4", "")]  # fmt: skip
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"file": file, "text": text}) for file, text in rows))
    found = records("folder", "--media", clips, "--table", tmp_path / "texts.jsonl")
    convert(found, "folder", tmp_path / "shards", max_rejected=1.0)
    assert reasons(tmp_path / "shards") == {
        "cut.mp4": "unreadable video",
        "song.mp3": "unknown kind",
        "gone.mp4": "missing file",
        "sub": "unknown kind",
        "sub/b b.mp4": "empty caption",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "empty"),
        ("t.csv", b"name,text\na.mp4,x\n", "line 2: no 'file' among name, text: name it with --map file=COLUMN"),
        ("t.csv", b"file,caption\na.mp4,x\n", "no 'text' among file, caption: name it with --map text=COLUMN"),
        ("t.csv", b"file,text\na.mp4,two dogs, running\n", "line 2: more cells than columns"),
        ("t.csv", b"file,text\na.mp4,\xff\n", "not UTF-8"),
        ("t.csv", b'file,text\na.mp4,"x\n', "line 2: unexpected end of data"),
        ("t.csv", b"file,text\n", "no records: the annotations name no image or video"),
        ("t.jsonl", b'{"file": "a.mp4", "text": "x"}\n{"file"', "line 2: not JSON"),
        ("t.jsonl", b'["a.mp4", "x"]', "line 1: an object is expected"),
        ("t.jsonl", b"{}", "line 1: no 'file' among no columns"),
        ("t.txt", b"a.mp4 x", "must end in .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_tables_that_cannot_be_read(clips, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert(records("folder", "--media", clips, "--table", tmp_path / name), "folder", tmp_path / "shards")
