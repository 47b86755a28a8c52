"""Local shards that change under a run are noticed, at a bounded rate; tars missing in the manifest are named."""

from __future__ import annotations

import time

import pytest

from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.data.shards.verify import ShardVerifier, unlisted_tars
from tests.support.tars import write_index, write_tar

FAST = 1e6  # MiB a second


@pytest.fixture
def folder(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, [(f"{name[0]}{i}.txt", b"a dog on the grass") for i in range(3)])
    write_index(tmp_path, {"a.tar": 3, "b.tar": 3})
    return tmp_path


def findings(index, rate=FAST, seconds=10.0):
    """All that is found until the thread has ended."""
    verifier = ShardVerifier({"photos": index}, rate)
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end and not found:
        found += verifier.findings()
        time.sleep(0.02)
    verifier.close()
    return found


def test_sound_shards_are_silent(folder):
    verifier = ShardVerifier({"photos": ShardIndex.load(folder)}, FAST)
    time.sleep(0.5)
    assert verifier.findings() == []


@pytest.mark.parametrize("place", [600, -1500])
def test_captions_overwritten_with_the_same_size(folder, place):
    index = ShardIndex.load(folder)
    content = bytearray((folder / "b.tar").read_bytes())
    at = content.index(b"grass") if place > 0 else content.rindex(b"grass")
    content[at : at + 5] = b"floor"
    (folder / "b.tar").write_bytes(content)
    assert ShardIndex.load(folder) == index  # the size says nothing
    (found,) = findings(index)
    assert found.startswith(f"source photos: {folder / 'b.tar'} was overwritten") and "sha256 differs" in found


def test_a_shard_that_disappears(folder):
    index = ShardIndex.load(folder)
    (folder / "a.tar").unlink()
    (found,) = findings(index)
    assert f"{folder / 'a.tar'} cannot be read any more: No such file" in found


def test_tars_that_the_manifest_does_not_name(folder):
    write_tar(folder / "late.tar", [("x.txt", b"a cat")])
    index = ShardIndex.load(folder)
    assert unlisted_tars(index) == ["late.tar"]
    (found,) = findings(index, rate=0)
    assert "1 tars that index.json does not name, such as late.tar; they are not read" in found
    (folder / "index.json").unlink()
    assert unlisted_tars(ShardIndex.load(folder)) == []  # without a manifest all tars are read


def test_the_rate_is_bounded_and_closing_ends_it(folder):
    (folder / "b.tar").write_bytes(bytes(4 * 2**20))
    write_index(folder, {"a.tar": 3, "b.tar": 1})
    index = ShardIndex.load(folder)
    content = bytearray(4 * 2**20)
    content[-1] = 1
    (folder / "b.tar").write_bytes(content)
    started = time.monotonic()
    assert len(findings(index, rate=8)) == 1
    assert time.monotonic() - started > 0.3  # 4 MiB at 8 MiB/s take half a second
    assert findings(index, rate=1e-3, seconds=0.3) == []
