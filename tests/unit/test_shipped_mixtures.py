"""The recipes for large runs fill their packs, on real photos and videos."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import islice

import pytest

from data_tools.convert import convert
from data_tools.formats import coco, folder
from data_tools.parts import Settings
from data_tools.tokenizer.train import train
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from tests.conftest import REPOSITORY
from tests.support.datasets import read

PACKS = 16


@pytest.fixture(scope="module")
def shards(shared_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    photos = shared_data / "coco_cc_by"
    captions = photos / "annotations" / "captions_train2017.json"
    convert(read(coco, "--images", photos / "train2017", "--annotations", captions), root / "images", Settings("coco"))
    clips = shared_data / "videos_intel"
    names = sorted(str(path.relative_to(clips)) for path in clips.rglob("*") if path.suffix in (".mkv", ".mp4"))
    with (root / "texts.csv").open("w", newline="") as file:
        rows = [["file", "text"], *([name, f"somebody shows the sign of {name}"] for name in names)]
        csv.writer(file).writerows(rows)
    found = read(folder, "--media", clips, "--table", root / "texts.csv")
    convert(found, root / "videos", Settings("clips"))
    train([root / "images", root / "videos"], root / "tokenizer.model", vocab_size=500)
    return root


@pytest.mark.parametrize("name", ["base", "large"])
def test_at_least_97_of_100_tokens_are_real(shards, name):
    recipe = load_recipe(REPOSITORY / "launch" / "recipes" / f"{name}.toml")
    sources = tuple(replace(source, path=str(shards / source.name)) for source in recipe.data.sources)
    data = replace(recipe.data, sources=sources, lanes=2, workers=0, shuffle_block=4)
    encode = Encoder(build_tasks(recipe, Tokenizer(shards / "tokenizer.model")))
    vision = recipe.model.vision
    loader = Loader(data, sources, encode, vision.patch_size, vision.merge, 1, 0, 1, 1, 1)
    batches = [batch for step in islice(iter(loader), PACKS) for batch in step]
    loader.close()
    assert sum(batch.counts["tokens"] for batch in batches) / sum(len(batch.tokens) for batch in batches) >= 0.97
