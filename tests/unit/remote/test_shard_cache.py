"""The cache of remote shards, which processes share: what is downloaded, kept and removed."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.shards import remote
from dsmoe_vl.data.shards.index import Shard, ShardIndex, read_sample
from dsmoe_vl.data.shards.prefetch import Prefetcher
from dsmoe_vl.errors import DataError, FetchError
from tests.support.remote_shards import cached, impatient, until
from tests.support.tars import write_index, write_tar
from tests.support.web import STUCK, Web

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(60)
FIRST = "a/00000.tar"


def test_announced_shards_are_fetched_ahead(web: Web, data: DataConfig) -> None:
    index = ShardIndex.load(f"{web.url}/a", data)
    prefetcher = pickle.loads(pickle.dumps(Prefetcher([index])))
    prefetcher.announce(0, 0)
    prefetcher.announce(0, 2)
    prefetcher.announce(0, 0)
    until(lambda: len(cached(data)) == 2)
    assert read_sample(index, 2, 0).key == "a-2-0"
    assert [web.requests[f"a/0000{i}.tar"] for i in range(4)] == [1, 0, 1, 0]


def test_what_cannot_be_fetched_ahead_is_left_to_the_reader(web: Web, data: DataConfig) -> None:
    web.always[FIRST] = 404
    web.faults["a/00003.tar"] = [503, 503, 503]
    index = ShardIndex.load(f"{web.url}/a", impatient(data))
    prefetcher = Prefetcher([index])
    for shard in (0, 3, 2):
        prefetcher.announce(0, shard)
    until(lambda: len(cached(data)) == 2)
    with pytest.raises(DataError, match=r"00000\.tar"):
        read_sample(index, 0, 0)
    assert read_sample(index, 3, 0).key == "a-3-0"


def test_a_changed_shard_is_another_file(web: Web, folder: Path, data: DataConfig) -> None:
    url = f"{web.url}/a"
    old = ShardIndex.load(url, data)
    assert read_sample(old, 0, 0).key == "a-0-0"
    size = (folder / "00000.tar").stat().st_size
    members = [(f"b-{i}.{kind}", b"x" * 20) for i in range(37) for kind in ("jpg", "txt")]
    assert write_tar(folder / "00000.tar", members).stat().st_size <= size
    write_index(folder, {"00000.tar": 37})
    new = ShardIndex.load(url, data)
    assert read_sample(new, 0, 0).key == "b-0"
    assert read_sample(old, 0, 0).key == "a-0-0"  # still there
    shutil.rmtree(old.folder)
    with pytest.raises(DataError, match=r"shard cannot be fetched: .*00000\.tar: twice "):
        read_sample(old, 0, 0)
    assert read_sample(new, 0, 0).key == "b-0"


def test_least_recently_used_shards_are_removed(web: Web, folder: Path, data: DataConfig, caplog) -> None:
    sizes = [(folder / f"{shard:05d}.tar").stat().st_size for shard in range(4)]
    data = dataclasses.replace(data, cache_gib=(sizes[0] + sizes[2] + sizes[3] - 1) / 2**30)
    index = ShardIndex.load(f"{web.url}/a", data)
    read_sample(index, 0, 0)
    strangers = [index.folder / "mine.tar", Path(data.cache) / "mine.tar", Path(data.cache) / "data" / "0.tar"]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_bytes(bytes(10**6))
        os.utime(stranger, (0, 0))
    read_sample(index, 2, 0)
    for path in index.folder.glob("*-0*"):
        os.utime(path, (10**9, 10**9))
    abandoned = index.folder / f"{'0' * 16}-00009.tar.x.partial"
    abandoned.write_bytes(b"")
    os.utime(abandoned, (10**9, 10**9))
    read_sample(index, 0, 1)  # makes it the more recent one
    assert "too small" not in caplog.text
    read_sample(index, 3, 0)
    assert cached(data) == ["00000.tar", "00003.tar"]
    assert all(stranger.exists() for stranger in strangers)
    read_sample(index, 2, 0)
    assert "too small" in caplog.text
    assert web.requests["a/00002.tar"] == 2


def test_a_shard_removed_or_cut_in_use_is_fetched_again(web: Web, data: DataConfig, monkeypatch) -> None:
    index = ShardIndex.load(f"{web.url}/a", data)
    expected = read_sample(index, 0, 5)
    (path,) = index.folder.glob("*-00000.tar")
    path.unlink()
    assert read_sample(index, 0, 5) == expected
    path.write_bytes(path.read_bytes()[:100])
    assert read_sample(index, 0, 5) == expected
    fetch, removals = remote.RemoteShards.fetch, [1]

    def fetch_and_remove(self: remote.RemoteShards, *row) -> Path:
        fetched = fetch(self, *row)
        if removals and removals.pop():
            fetched.unlink()
        return fetched

    monkeypatch.setattr(remote.RemoteShards, "fetch", fetch_and_remove)
    assert read_sample(index, 0, 5) == expected
    removals[:] = [1] * 10
    with pytest.raises(FetchError, match=r"removed 10 times .* raise data\.cache_gib"):
        read_sample(index, 0, 5)


def test_a_cache_that_cannot_be_written(web: Web, data: DataConfig) -> None:
    Path(data.cache).write_text("a file")
    with pytest.raises(FetchError, match=r"data\.cache = .* choose another folder"):
        read_sample(ShardIndex.load(f"{web.url}/a", data), 0, 0)


def fetcher(url: str, cache: str, shards: list[Shard]) -> subprocess.Popen[bytes]:
    """A process that fetches `shards` one after the other."""
    rows = [(shard.name, shard.bytes, shard.sha256) for shard in shards]
    script = (
        "from dsmoe_vl.config.recipe import DataConfig; from dsmoe_vl.data.shards.remote import RemoteShards\n"
        f"folder = RemoteShards({url!r}, DataConfig(cache={cache!r}))\n"
        f"for row in {rows!r}: print(folder.fetch(*row).stat().st_size)\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)


def test_processes_share_one_cache(web: Web, folder: Path, data: DataConfig) -> None:
    shards = [shard for shard in ShardIndex.load(folder).shards if shard.samples]
    orders = [shards, shards[::-1], shards[1:] + shards[:1]]
    processes = [fetcher(f"{web.url}/a", data.cache, order) for order in orders]
    for process, order in zip(processes, orders, strict=True):
        out, _ = process.communicate(timeout=40)
        assert [int(line) for line in out.split()] == [shard.bytes for shard in order]
    assert web.requests == {f"a/{shard.name}": 1 for shard in shards}
    assert cached(data) == sorted(shard.name for shard in shards)


def test_a_killed_downloader_lets_the_others_continue(web: Web, folder: Path, data: DataConfig) -> None:
    index = ShardIndex.load(f"{web.url}/a", data)
    web.faults[FIRST] = [STUCK]
    process = fetcher(f"{web.url}/a", data.cache, [index.shards[0]])
    until(lambda: web.is_stuck.is_set() and list(index.folder.glob("*.partial")))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read_sample, index, 0, 0)
        time.sleep(0.2)
        assert not waiting.done() and web.requests[FIRST] == 1
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert waiting.result(timeout=30).key == "a-0-0"
    assert web.requests[FIRST] == 2


def test_a_stopped_downloader_is_not_waited_for(web: Web, data: DataConfig, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_LOCK_TIMEOUT", 0.2)
    index = ShardIndex.load(f"{web.url}/a", data)
    read_sample(index, 0, 0)
    (path,) = index.folder.glob("*-00000.tar")
    path.unlink()
    (lock,) = (Path(data.cache) / "locks").iterdir()
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read_sample(index, 0, 0).key == "a-0-0"


def test_those_that_wait_for_a_dead_server_end_together(web: Web, data: DataConfig) -> None:
    web.always[FIRST] = 503
    indexes = [ShardIndex.load(f"{web.url}/a", impatient(data, 0.5)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read_sample, index, 0, 0) for index in indexes]
        messages = [str(reader.exception(timeout=30)) for reader in readers]
    assert sum(": 1 attempts in" in message for message in messages) == 3, messages
