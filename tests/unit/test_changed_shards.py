"""Shards that were written anew, with the same names, counts and sizes, are noticed when a run is continued."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample_stream import SampleStream
from dsmoe_vl.data.shards.index import ShardIndex, _cached_scan
from tests.support.tars import write_index, write_tar

DATA = DataConfig(lanes=1, workers=0, shuffle_block=2, lookahead=2, pack_length=8, pack_patches=4)


def write(folder: Path, word: str = "dog", media: bytes = b"x" * 9, manifest: bool = True) -> Path:
    _cached_scan.cache_clear()  # a process takes shards that it has read as unchanged
    for shard in range(2):
        members = []
        for number in range(3):
            key = f"{shard}{number}"
            members += [(f"{key}.jpg", media), (f"{key}.json", json.dumps({"caption": f"a {word} {key}"}).encode())]
        write_tar(folder / f"{shard}.tar", members)
    if manifest:
        write_index(folder, {"0.tar": 3, "1.tar": 3})
    return folder


def loader(folder: Path) -> Loader:
    sources = (SourceConfig("mine", str(folder)),)
    return Loader(DATA, sources, lambda sample: [], 2, 2, 1, rank=0, ranks=1, micro_batch=1, accumulation=1)


@pytest.mark.parametrize("manifest", [True, False])
def test_other_captions_of_the_same_size_are_noticed(tmp_path, manifest):
    state = json.loads(json.dumps(loader(write(tmp_path / "a", manifest=manifest)).state_dict()))
    assert loader(tmp_path / "a").load_state_dict([state]) == []
    before = ShardIndex.load(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    write(tmp_path / "a", "cat", manifest=manifest)
    now = ShardIndex.load(tmp_path / "a")
    assert now.fingerprint == before.fingerprint and now.contents != before.contents
    (note,) = loader(tmp_path / "a").load_state_dict([state])
    other = "bytes" if manifest else "texts"
    assert note.startswith(f"data.sources, mine: its shards have other {other} than when the checkpoint was written")


@pytest.mark.parametrize("manifest", [True, False])
def test_a_copy_is_not_a_change(tmp_path, manifest):
    state = loader(write(tmp_path / "a", manifest=manifest)).state_dict()
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    for tar in (tmp_path / "b").glob("*.tar"):
        os.utime(tar, (1, 1))
    assert loader(tmp_path / "b").load_state_dict([state]) == []


def test_what_was_not_known_is_no_change(tmp_path):
    """A checkpoint from before there was such a hash; a manifest that was added or lost."""
    state = loader(write(tmp_path / "a")).state_dict()
    older = {name: value for name, value in state.items() if name != "contents"}
    write(tmp_path / "a", "cat")
    assert len(loader(tmp_path / "a").load_state_dict([state])) == 1
    assert loader(tmp_path / "a").load_state_dict([older]) == []
    (tmp_path / "a" / "index.json").unlink()
    assert loader(tmp_path / "a").load_state_dict([state]) == []


def test_other_pictures_are_noticed_with_a_manifest_only(tmp_path):
    for manifest in (True, False):
        folder = tmp_path / str(manifest)
        before = ShardIndex.load(write(folder, manifest=manifest)).contents
        shutil.rmtree(folder)
        changed = ShardIndex.load(write(folder, media=b"y" * 9, manifest=manifest)).contents != before
        assert changed == manifest


def test_a_stream_for_other_trainers_warns(tmp_path):
    state = SampleStream([write(tmp_path / "a")], data=DATA).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SampleStream([tmp_path / "a"], data=DATA).load_state_dict([state])
    write(tmp_path / "a", "cat")
    with pytest.warns(UserWarning, match="its shards have other bytes"):
        SampleStream([tmp_path / "a"], data=DATA).load_state_dict([state])
