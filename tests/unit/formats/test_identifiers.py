"""Identifiers are compared as the text that they have in the shards; annotations of any type end in no traceback."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest

from data_tools.check import Reencoding, check
from data_tools.convert import convert
from data_tools.formats import activitynet, coco, folder, karpathy, llava, msrvtt, qvhighlights, tvsum, vatex, videoxum
from data_tools.formats.identifiers import identifier_text
from data_tools.parts import Settings
from data_tools.writer import sample_key
from dsmoe_vl.errors import DataError
from tests.support.datasets import photo, read, written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"), (1.0, "1"), ("1", "1"), ("01", "01"), ("1.0", "1.0"), (-7, "-7"), (1e3, "1000"), (0.5, "0.5"),
        (10**30, "1" + "0" * 30), (1e30, str(int(1e30))), (0, "0"), (" a ", " a "), (1.5, "1.5"),
        (None, None), (True, None), (False, None), ("", None), (" \t", None), ([1], None), ({}, None),
        (math.nan, None), (math.inf, None),
    ],
)  # fmt: skip
def test_the_text_of_an_identifier(value, text):
    assert identifier_text(value) == text
    assert identifier_text(10**5000) is None  # more digits than Python writes


def coco_file(images: list[Any], captioned: list[Any]) -> dict[str, Any]:
    return {
        "licenses": [{"id": "4", "url": "http://cc"}],
        "images": [{"id": one, "file_name": f"{i}.jpg", "license": 4} for i, one in enumerate(images)],
        "annotations": [{"image_id": one, "caption": f"photo {i}"} for i, one in enumerate(captioned)],
    }


class TestCoco:
    def read(self, tmp_path, images, captioned):
        path = written(tmp_path / "captions.json", coco_file(images, captioned))
        return read(coco, "--images", tmp_path, "--annotations", path)

    @pytest.mark.parametrize(
        ("images", "captioned"),
        [([1, 2], ["1", "2"]), (["1", "2"], [1, 2]), ([1.0, 2], ["1", 2.0]), (["a/b", "01"], ["a/b", "01"])],
    )
    def test_lists_that_write_ids_differently(self, tmp_path, images, captioned):
        first, second = self.read(tmp_path, images, captioned)
        assert (first.captions, second.captions) == (["photo 0"], ["photo 1"])
        assert first.identifier == identifier_text(images[0]) and first.meta["licence"] == "http://cc"

    def test_it_converts(self, tmp_path):
        for name in ("0.jpg", "1.jpg"):
            photo(tmp_path / name)
        found = self.read(tmp_path, [0, 1], ["0", "1"])
        assert convert(found, tmp_path / "s", Settings("coco"), 0.0).written == 2

    def test_texts_that_differ_are_different(self, tmp_path):
        listed, other = self.read(tmp_path, [1], ["01"])
        assert (listed.captions, other.identifier, other.media) == ([], "01", None)

    @pytest.mark.parametrize("ids", [[7, "7"], [7, 7.0], ["7", 5, "7"]])
    def test_twice(self, tmp_path, ids):
        places = rf"images\[0\] and .*images\[{len(ids) - 1}\] have the identifier '7': identifiers must be unique"
        with pytest.raises(DataError, match=places):
            self.read(tmp_path, ids, [7])

    @pytest.mark.parametrize("bad", [None, True, [], {}, "", math.nan])
    def test_no_identifier(self, tmp_path, bad):
        with pytest.raises(DataError, match=r"annotations\[1\]: .* is not an identifier"):
            self.read(tmp_path, [1], [1, bad])


def test_msrvtt_numbers_and_texts(read_videos, tmp_path):
    content = {
        "videos": [{"video_id": 7, "split": "test"}, {"video_id": "8", "split": "test"}],
        "sentences": [
            {"video_id": "7", "caption": "a"},
            {"video_id": 7.0, "caption": "b"},
            {"video_id": 8, "caption": "c"},
        ],
    }
    assert [(r.identifier, r.captions) for r in read_videos(msrvtt, content)] == [("7", ["a", "b"]), ("8", ["c"])]
    subset = written(tmp_path / "s.jsonl", '{"video_id": 8}\n')
    assert [r.captions for r in read_videos(msrvtt, content, "--subset", subset)] == [["c"]]
    content["videos"].append({"video_id": "7"})
    with pytest.raises(DataError, match=r"videos\[0\] and .*videos\[2\] have the identifier '7'"):
        read_videos(msrvtt, content)


def test_other_formats_name_both_places(read_videos, tmp_path):
    with pytest.raises(DataError, match=r"entry 0 and .*entry 1 have the identifier '5'"):
        read_videos(vatex, [{"videoID": 5, "enCap": ["a"]}, {"videoID": "5", "enCap": ["b"]}])
    row = {"duration": 5, "timestamps": [[0, 5]], "tsum": ["a"], "vsum_onehot": [[1]]}
    with pytest.raises(DataError, match=r"entry 0 and .*entry 1 have the identifier 'v'"):
        read_videos(videoxum, [{"video_id": "v", **row}, {"video_id": "v", **row}])
    lines = [json.dumps({"qid": qid, "query": "a", "duration": 5, "vid": 3}) for qid in (1, 2, "1")]
    with pytest.raises(DataError, match=r"line 1 and .*line 3 have the identifier '1'"):
        read_videos(qvhighlights, "\n".join(lines), name="a.jsonl")
    entry = json.dumps({"duration": 5, "timestamps": [[0, 5]], "sentences": ["a"]})
    with pytest.raises(DataError, match=r"'v_x' occurs 2 times in an object, as entries 1 and 3"):
        read_videos(activitynet, f'{{"v_x": {entry}, "v_y": {entry}, "v_x": {entry}}}')
    info = written(tmp_path / "i.tsv", "c\tv\tt\tu\tl\nc\tw\tt\tu\tl\nc\tv\tother\tu\tl\n")
    with pytest.raises(DataError, match=r"line 1 and .*line 3 have the identifier 'v'"):
        read_videos(tvsum, "v\tVT\t1,2\n", "--info", info)


def test_folder_ids(tmp_path):
    rows = [{"file": "a.jpg", "text": "x", "id": 1.0}, {"file": 5, "text": "x", "id": "01"}]
    table = written(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    found = read(folder, "--media", tmp_path, "--table", table)
    assert [(record.identifier, record.media.name) for record in found] == [("1", "a.jpg"), ("01", "5")]
    rows[1]["id"] = 1
    written(table, "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"gives a.jpg and 5 the same id, '1'"):
        read(folder, "--media", tmp_path, "--table", table)


SEGMENTS = {"duration": 5, "timestamps": [[0, 2], [2, 5]]}
GOOD: dict[Any, tuple[Any, tuple[str, ...]]] = {
    coco: (coco_file([1, 2], [1, 2]), ("--images",)),
    karpathy: (
        {"images": [{"filename": "a.jpg", "filepath": "x", "split": "val", "cocoid": 1, "sentences": [{"raw": "a"}]}]},
        ("--part", "val", "--images"),
    ),
    llava: ([{"id": "1", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "a"}]}], ("--images",)),
    msrvtt: (
        {
            "videos": [{"video_id": "a", "split": "test", "url": "u", "start time": 1.5, "end time": 9.0}],
            "sentences": [{"video_id": "a", "caption": "x"}],
        },
        ("--videos",),
    ),
    vatex: ([{"videoID": "a_000001_000002", "enCap": ["x", "y"]}], ("--videos",)),
    videoxum: ([{"video_id": "v_a", "tsum": ["a", "b"], "vsum_onehot": [[0, 1], [1, 1]], **SEGMENTS}], ("--videos",)),
    activitynet: ({"v_a": {"sentences": ["a", "b"], **SEGMENTS}}, ("--videos",)),
    qvhighlights: (
        {
            "qid": 1, "query": "a", "duration": 4, "vid": "v", "relevant_windows": [[0, 2]],
            "relevant_clip_ids": [0], "saliency_scores": [[1, 2, 3]],
        },
        ("--videos",),
    ),
    folder: (
        {"file": "a.jpg", "text": "x", "id": 3, "summary": "s", "importance": [0.5], "saliency": [[0.5]]},
        ("--media",),
    ),
}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e308, 10**400, "", "x", "\0", "../x", "\ud800", "é" * 300, [], [[]], {},
    [None], [1, "a"], {"a": 1}, {"id": 1}, math.nan, math.inf, [math.nan], [[1], [1, 2]],
    "a" * 5000, [[[[]]]], "/", ".", "[0.5", -0.0,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


@pytest.mark.parametrize("module", GOOD, ids=lambda module: module.NAME)
def test_annotations_of_any_type(module, tmp_path):
    good, options = GOOD[module]
    rng = np.random.default_rng(3)
    photo(tmp_path / "m" / "a.jpg")
    photo(tmp_path / "m" / "0.jpg")
    is_table = module in (qvhighlights, folder)
    path = tmp_path / ("t.jsonl" if is_table else "t.json")
    option = "--table" if module is folder else "--annotations"
    used = 0
    for number in range(100):
        content = copy.deepcopy(good)
        for _ in range(1 + number % 2):
            *way, last = list(places(content))[int(rng.integers(len(places(content))))] or (None,)
            value = copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
            if last is None:
                content = content if is_table else value
                continue
            parent = content
            for key in way:
                parent = parent[key]
            if number % 5 == 4 and isinstance(parent, dict):
                del parent[last]
            else:
                parent[last] = value
        path.write_text(json.dumps(content), encoding="utf-8")
        try:
            found = read(module, *options, tmp_path / "m", option, path)
        except DataError as error:
            assert str(path.name) in str(error) or "--" in str(error), error
            continue
        repr(found)
        for record in found:
            check(record, "test", Reencoding())
            used += bool(sample_key(record.identifier))
    assert used > 10


def test_json_that_is_too_deep(tmp_path):
    path = written(tmp_path / "deep.json", "[" * 100_000)
    for module, options in ((coco, ("--images",)), (vatex, ("--videos",)), (activitynet, ("--videos",))):
        with pytest.raises(DataError, match="not JSON"):
            read(module, *options, tmp_path, "--annotations", path)
