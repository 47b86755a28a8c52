"""Remote shards: every kind of URL, every way to fail, and a cache that processes share."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.loader import Loader, evaluation_packs
from dsmoe_vl.data.shards import remote
from dsmoe_vl.data.shards.index import Shard, ShardIndex, iterate_samples, read_sample
from dsmoe_vl.data.shards.prefetch import Prefetcher
from dsmoe_vl.errors import ConfigError, DataError, FetchError
from tests.support.tars import write_index, write_shards, write_tar
from tests.support.web import CUT, SILENT, STUCK, WRONG, Web, serving
from tests.unit.test_loader import DATA, encode

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]
COUNTS = [37, 0, 64, 12]
FIRST = "a/00000.tar"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "served" / "a", COUNTS)


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    with serving(folder.parent) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return dataclasses.replace(
        DATA, cache=str(tmp_path / "cache"), fetch_patience_seconds=20.0, allow_pipe=True, max_bad_fraction=0.9
    )


def impatient(data: DataConfig, seconds: float = 0.3) -> DataConfig:
    return dataclasses.replace(data, fetch_patience_seconds=seconds)


def loader_of(path: str | Path, data: DataConfig, quarantine: Path | None = None) -> Loader:
    sources = (SourceConfig("a", str(path)),)
    return Loader(
        data, sources, encode, 16, 2, seed=1, rank=0, ranks=1, micro_batch=2, accumulation=2, quarantine=quarantine
    )


def take(loader: Loader, steps: int) -> list[Batch]:
    batches = [batch for _, step in zip(range(steps), loader, strict=False) for batch in step]
    loader.close()
    return batches


def cached(data: DataConfig) -> list[str]:
    return sorted(path.name[17:] for path in Path(data.cache).glob("*/*-*") if path.parent.name != "locks")


def test_every_kind_of_url_reads_like_the_folder(folder: Path, web: Web, data: DataConfig) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/remote_test/a", recursive=True)
    local = list(iterate_samples(folder, "s"))
    assert len(local) == sum(COUNTS)
    for url in (
        f"{web.url}/a",
        f"{web.url}/a/",
        f"file://{folder}",
        "memory://remote_test/a",
        f"pipe:cat {folder}/{{}}",
    ):
        remote_data = dataclasses.replace(data, cache=f"{data.cache}/{url[:6]}")
        assert list(iterate_samples(url, "s", data=remote_data)) == local
        index = ShardIndex.load(url, remote_data)
        assert (index.fingerprint, index.split) == (ShardIndex.load(folder).fingerprint, "train")
        again = pickle.loads(pickle.dumps(index))  # as for a worker process that is not forked
        assert read_sample(again, 0, 0, "s") == local[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_equals_the_local_one_bit_for_bit(folder: Path, web: Web, data: DataConfig, workers: int) -> None:
    data = dataclasses.replace(data, workers=workers)
    random_state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    web.faults[FIRST] = [500, CUT]
    local, over_http = (loader_of(path, data) for path in (folder, f"{web.url}/a"))
    for one, other in zip(take(local, 12), take(over_http, 12), strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)
    assert over_http.state_dict() == local.state_dict()
    over_http.load_state_dict([local.state_dict()])  # a run may move from one to the other
    assert random.getstate() == random_state[0] and np.random.get_state()[1].tolist() == random_state[1]
    assert torch.equal(torch.get_rng_state(), random_state[2])
    assert web.requests == {"a/index.json": 1, FIRST: 3, "a/00002.tar": 1, "a/00003.tar": 1}


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


def test_evaluation(folder: Path, web: Web, data: DataConfig) -> None:
    keys = [
        key for pack in evaluation_packs(data, SourceConfig("a", f"{web.url}/a"), encode, 16, 2) for key in pack.keys
    ]
    assert sorted(keys) == sorted(sample.key for sample in iterate_samples(folder))


@pytest.mark.parametrize("faults", [[500], [503, 429, 408], [CUT], [STUCK], [SILENT], [WRONG], [502, WRONG, CUT]])
def test_what_passes_is_tried_again(folder: Path, web: Web, data: DataConfig, faults: list, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE", 0.3)
    web.faults["a/index.json"] = [fault for fault in faults if fault != WRONG]
    web.faults[FIRST] = list(faults)
    assert list(iterate_samples(f"{web.url}/a", data=data)) == list(iterate_samples(folder))
    assert web.requests[FIRST] == len(faults) + 1
    assert cached(data) == ["00000.tar", "00002.tar", "00003.tar"]


@pytest.mark.parametrize("fault", [503, CUT, SILENT])
def test_a_server_that_keeps_failing_ends_the_run(web: Web, data: DataConfig, fault: int | str) -> None:
    data = impatient(data)
    web.always[FIRST] = fault
    index = ShardIndex.load(f"{web.url}/a", data)
    with pytest.raises(FetchError) as raised:
        read_sample(index, 0, 0)
    last = {503: "HTTP 503 Service Unavailable", CUT: "ended after", SILENT: "timed out"}[fault]
    for part in (f"{web.url}/{FIRST}", f"{web.requests[FIRST]} attempts", last, "data.fetch_patience_seconds = 0.3"):
        assert part in str(raised.value)
    web.always["a/index.json"] = fault
    with pytest.raises(FetchError, match=r"index\.json cannot be fetched"):
        ShardIndex.load(f"{web.url}/a", data)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_ends_with_the_message(web: Web, data: DataConfig, workers: int) -> None:
    web.always.update({f"a/{shard:05d}.tar": 503 for shard in range(len(COUNTS))})
    loader = loader_of(f"{web.url}/a", dataclasses.replace(impatient(data), workers=workers))
    with pytest.raises(DataError, match=r"tar cannot be fetched: \d+ attempts in .* HTTP 503"):
        take(loader, 1)
    assert loader.report() == {}  # no sample is to blame
    loader.close()


def test_nobody_listens(data: DataConfig) -> None:
    with pytest.raises(FetchError, match="ConnectionRefusedError"):
        ShardIndex.load("http://127.0.0.1:9/a", impatient(data, 0.1))


@pytest.mark.parametrize("fault", [404, 403, 410, WRONG])
def test_a_lost_shard_is_bad_samples(web: Web, data: DataConfig, tmp_path: Path, fault: int | str) -> None:
    web.always["a/00002.tar"] = fault
    streams = []
    for run in ("first", "second"):
        loader = loader_of(f"{web.url}/a", data, quarantine=tmp_path / run)
        streams.append(take(loader, 8))
        report = loader.report()
        assert report["a/errors"] == report["a/errors/shard cannot be fetched"] > 50
        listed = [json.loads(line) for line in (tmp_path / run).read_text().splitlines()]
        assert {bad["shard"] for bad in listed} == {"00002.tar"}
        reason = "00002.tar: twice sha256" if fault == WRONG else f"00002.tar: HTTP {fault}"
        assert reason in listed[0]["reason"] and f"{web.url}/a" in listed[0]["reason"]
    assert [batch.keys for batch in streams[0]] == [batch.keys for batch in streams[1]]
    runs, attempts = 2, 2 if fault == WRONG else 1
    assert attempts <= web.requests["a/00002.tar"] / runs <= 2 * attempts  # ahead, and when it is read


def test_no_index(web: Web, folder: Path, data: DataConfig) -> None:
    for url in (f"{web.url}/none", "memory://none", f"file://{folder}/none"):
        with pytest.raises(DataError, match=r"none: index\.json cannot be fetched: .* needs index\.json"):
            ShardIndex.load(url, data)
    with pytest.raises(DataError, match=r"unknown protocol|Protocol not known"):
        ShardIndex.load("nonsense://bucket/a", data)


@pytest.mark.parametrize("sha256", ["", "../../../../../etc/x", "A" * 64])
def test_a_manifest_without_hashes(web: Web, folder: Path, data: DataConfig, sha256: str) -> None:
    row = {"name": "00000.tar", "samples": 1, "bytes": 1, "sha256": sha256}
    write_index(folder, {}, shards=[row])
    with pytest.raises(DataError, match=r"no sha256 of 00000\.tar"):
        ShardIndex.load(f"{web.url}/a", data)


def test_a_token_in_the_query_stays_secret(folder: Path, data: DataConfig) -> None:
    with serving(folder.parent, query="token=secret") as web:
        index = ShardIndex.load(f"{web.url}/a/?token=secret", data)
        assert read_sample(index, 0, 0).key == "a-0-0"
        assert ShardIndex.load(f"{web.url}/a?token=secret", data).folder == index.folder
        web.always["a/00002.tar"] = 404
        with pytest.raises(DataError) as lost:
            read_sample(index, 2, 0)
        web.always["a/00003.tar"] = 500
        assert index.remote is not None
        with pytest.raises(FetchError) as failing:
            read_sample(ShardIndex.load(f"{web.url}/a?token=secret", impatient(data)), 3, 0)
        assert "secret" not in f"{lost.value} {failing.value}"


def test_pipes_need_permission(folder: Path, data: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.allow_pipe = true"):
        ShardIndex.load(f"pipe:cat {folder}/{{}}", dataclasses.replace(data, allow_pipe=False))
    with pytest.raises(ConfigError, match=r"data\.allow_pipe = true"):
        next(iterate_samples(f"pipe:cat {folder}/{{}}"))


def test_a_manifest_cannot_run_commands(folder: Path, data: DataConfig) -> None:
    name = "a;touch ruined.tar"
    shutil.copy(folder / "00000.tar", folder / name)
    write_index(folder, {name: 37})
    with pytest.raises(DataError, match=r"shard cannot be fetched: .* not a safe name in a shell command"):
        read_sample(ShardIndex.load(f"pipe:cd {folder} && cat {{}}", data), 0, 0)
    assert read_sample(ShardIndex.load(f"file://{folder}", data), 0, 0).key == "a-0-0"


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
    fetch, removals = remote.RemoteFolder.fetch, [1]

    def fetch_and_remove(self: remote.RemoteFolder, *row) -> Path:
        fetched = fetch(self, *row)
        if removals and removals.pop():
            fetched.unlink()
        return fetched

    monkeypatch.setattr(remote.RemoteFolder, "fetch", fetch_and_remove)
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
        "from dsmoe_vl.config.recipe import DataConfig; from dsmoe_vl.data.shards.remote import RemoteFolder\n"
        f"folder = RemoteFolder({url!r}, DataConfig(cache={cache!r}))\n"
        f"for row in {rows!r}: print(folder.fetch(*row).stat().st_size)\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    monkeypatch.setattr(remote, "_LIFELESS", 0.2)
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
