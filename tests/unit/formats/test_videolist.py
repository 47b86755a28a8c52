"""GluonCV's lists of videos: all forms, words for labels, and what is rejected line by line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_tools.check import Checked, Reencoding, check
from data_tools.convert import main
from data_tools.formats import coco, videolist
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import DataError
from tests.support.datasets import clip, problems, read, written
from tests.support.recordio import in_mxnet

CLASSES = "a person shoots an arrow\na person swims\n"


@pytest.fixture
def videos(tmp_path):
    for name in ("archery/a.mp4", "archery/b.mp4", "swim/c.mp4"):
        clip(tmp_path / "videos" / name)
    written(tmp_path / "classes.txt", CLASSES)
    return tmp_path


def listed(folder, content, *options):
    options = options or ("--classes", folder / "classes.txt")
    return read(videolist, "--videos", folder / "videos", "--list", written(folder / "train.txt", content), *options)


@pytest.mark.parametrize("content", ["archery/a.mp4 0\nswim/c 1\n", "archery/a 240 0\r\n\nswim/c.mp4 8 1"])
def test_texts_of_classes(videos, content):
    first, second = listed(videos, content)
    assert (first.media, second.media) == (videos / "videos/archery/a.mp4", videos / "videos/swim/c.mp4")
    assert (first.captions, second.captions) == (["a person shoots an arrow"], ["a person swims"])
    assert first.meta == {
        "videolist": {"label": [0], "part": None}, "content": "videolist: a person shoots an arrow"
    }  # fmt: skip


def test_parts_are_one_caption_in_time_order(videos):
    (record,) = listed(videos, "archery/a 90 120.5 1\narchery/a 0 90 0\n")
    assert record.captions == ["a person shoots an arrow a person swims"]
    assert record.meta["videolist"] == {"label": [0, 1], "part": [[0.0, 90.0], [90.0, 120.5]]}


def test_captions_by_path(videos):
    table = written(videos / "captions.csv", "file,text\narchery/a.mp4,an arrow flies\nswim/c,a pool\nd.mp4,none\n")
    found = listed(videos, "archery/a 9 0\nswim/c 9 1\narchery/b.mp4 9 0\n", "--captions", table)
    assert [record.captions for record in found] == [["an arrow flies"], ["a pool"], []]
    assert all("content" not in record.meta for record in found)


def test_lines_and_videos_that_cannot_be_used(videos):
    (videos / "videos" / "frames").mkdir()
    content = "archery/a 9 0\na 9\narchery/b x 0\nswim/c 9 -1\nframes 9 0\nswim/c 9 2\n../d 9 0\n"
    found = listed(videos, content)
    assert problems(found) == {
        "frames": "folder of frames",
        "swim/c": "unknown label",
        "../d": "outside of the folder",
        "line 2": "malformed line",
        "line 3": "malformed line",
        "line 4": "malformed line",
    }
    assert "unknown label: 2, and there are 2 texts" in found[2].problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("archery/a\n", r"train.txt, line 1: 'archery/a': 1 columns: a line is one of path, label; "),
        ("a cat on a mat\n", r"line 1: .*: 5 columns"),
        ("archery/a 9 b\n", r"the label 'b' is no whole number"),
        ("archery/a 9 3 0\n", r"the part from 9 to 3 is empty"),
    ],
)
def test_another_file(videos, content, message):
    with pytest.raises(DataError, match=message):
        listed(videos, content)


def test_one_process_and_two_give_the_same_bytes(videos):
    written(videos / "train.txt", "archery/a 9 0\narchery/b 9 0\nswim/c 9 1\nmissing 9 1\n")
    for workers in (1, 2):
        words = ["videolist", "--videos", videos / "videos", "--list", videos / "train.txt", "--classes",
                 videos / "classes.txt", "--output", videos / str(workers), "--workers", workers,
                 "--samples-per-shard", 2, "--max-rejected", 0.5]  # fmt: skip
        assert main([str(word) for word in words]) == 0
    one, two = ({p.name: p.read_bytes() for p in sorted((videos / n).iterdir())} for n in "12")
    assert one == two and len(one) == 4
    samples = list(iterate_samples(SourceConfig.at(videos / "1")))
    assert [sample.text for sample in samples] == CLASSES.splitlines()[:1] * 2 + CLASSES.splitlines()[1:]
    assert samples[0].meta["content"] == samples[1].meta["content"] != samples[2].meta["content"]


def test_mutated_lists(videos):
    rng = np.random.default_rng(8)
    lists = [
        "archery/a 240 0\narchery/b.mp4 8 1\nswim/c 9 1\n" * 2,
        "archery/a 0 9 1\narchery/a 9 12.5 0\nswim/c 1 2 1\n",
    ]
    letters = [*"0123456789 ./-_e\n\r\t\0", "nan", "é", "²", "\u2028", "1e999"]
    used = refused = 0
    checked: dict[str, bool] = {}  # decoding the same videos again would show nothing
    for number in range(1000):
        text = list(lists[number % 2])
        for _ in range(int(rng.integers(1, 5))):
            place = int(rng.integers(len(text)))
            text[place : place + int(rng.integers(0, 3))] = rng.choice(letters, int(rng.integers(0, 3)))
        try:
            for record in listed(videos, "".join(text)):
                key = f"{record.media} {record.captions} {record.problem}"
                if key not in checked:
                    checked[key] = isinstance(check(record, "videolist", Reencoding()), Checked)
                used, refused = used + checked[key], refused + (not checked[key])
                json.dumps(record.meta, allow_nan=False)
        except DataError as error:
            refused += 1
            assert str(videos) in str(error)
    assert used > 1000 and refused > 300


def test_gluoncv_reads_the_same_list(videos):
    content = "archery/a.mp4 240 0\nswim/c 8 1\n\narchery/b.mp4\t9  0\n".replace("\n\n", "\n")
    ours = listed(videos, content)
    script = """
import json, sys
from gluoncv.data import VideoClsCustom
found = VideoClsCustom(root=sys.argv[1], setting=sys.argv[2], lazy_init=True)
print(json.dumps(found._make_dataset(sys.argv[1], sys.argv[2])))
"""
    theirs = json.loads(in_mxnet(script, videos / "videos", videos / "train.txt").splitlines()[-1])
    assert [(path, [label]) for path, _, label in theirs] == [
        (str(videos / "videos" / record.identifier), record.meta["videolist"]["label"]) for record in ours
    ]


def test_gluoncvs_layout_of_coco(tmp_path, shared_data):
    """Its folder `coco` is the one that the format `coco` expects; GluonCV itself opens the same JSON."""
    root = shared_data / "coco_cc_by"
    found = read(coco, "--images", root / "val2017", "--annotations", root / "annotations/captions_val2017.json")
    assert found and all(record.captions and record.media.exists() for record in found)
    instances = written(
        tmp_path / "instances_val2017.json", {"images": [], "annotations": [{"image_id": 1, "bbox": []}]}
    )
    with pytest.raises(DataError, match=r"instances_\*.json and person_keypoints_\*.json have no captions"):
        read(coco, "--images", root / "val2017", "--annotations", instances)
