"""Fixtures for the readers of raw datasets."""

from __future__ import annotations

import json

import pytest

from tests.support.datasets import read
from tests.unit.formats.video_files import write


@pytest.fixture
def read_videos(tmp_path):
    """The records of a video format, from the content of its annotation file and `more` options."""
    videos = tmp_path / "videos"
    videos.mkdir()

    def records(module, content, *more, name="annotations.json"):
        return read(module, "--videos", videos, "--annotations", write(tmp_path / name, content), *more)

    return records


@pytest.fixture
def coco(shared_data):
    """Real photos: their folder, and [(file name, COCO's id, captions)]."""
    root = shared_data / "coco_cc_by"
    content = json.loads((root / "annotations" / "captions_val2017.json").read_text())
    captions = {image["id"]: [] for image in content["images"]}
    for row in content["annotations"]:
        captions[row["image_id"]].append(row["caption"])
    return root, [(image["file_name"], image["id"], captions[image["id"]]) for image in content["images"]]
