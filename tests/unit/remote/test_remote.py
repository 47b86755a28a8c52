"""Remote shards: every kind of URL, and every way to fail."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.held_out_packs import held_out_packs
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.shards import remote
from dsmoe_vl.data.shards.index import ShardIndex, iterate_samples, read_sample
from dsmoe_vl.errors import ConfigError, DataError, FetchError
from tests.support.loading import COUNTS, encode
from tests.support.remote_shards import cached, impatient
from tests.support.tars import write_index
from tests.support.web import CUT, SILENT, STUCK, WRONG, Web, serving

pytestmark = pytest.mark.timeout(60)
FIRST = "a/00000.tar"


def loader_of(path: str | Path, data: DataConfig, quarantine: Path | None = None) -> Loader:
    sources = (SourceConfig("a", str(path)),)
    return Loader(
        data, sources, encode, 16, 2, seed=1, rank=0, ranks=1, micro_batch=2, accumulation=2, quarantine=quarantine
    )


def take(loader: Loader, steps: int) -> list[Batch]:
    batches = [batch for _, step in zip(range(steps), loader, strict=False) for batch in step]
    loader.close()
    return batches


def test_every_kind_of_url_reads_like_the_folder(folder: Path, web: Web, data: DataConfig) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/remote_test/a", recursive=True)
    local = list(iterate_samples(SourceConfig("s", str(folder))))
    assert len(local) == sum(COUNTS)
    for url in (
        f"{web.url}/a",
        f"{web.url}/a/",
        f"file://{folder}",
        "memory://remote_test/a",
        f"pipe:cat {folder}/{{}}",
    ):
        remote_data = dataclasses.replace(data, cache=f"{data.cache}/{url[:6]}")
        source = SourceConfig("s", url)
        expected = [dataclasses.replace(sample, source=source) for sample in local]
        assert list(iterate_samples(source, data=remote_data)) == expected
        index = ShardIndex.load(url, remote_data)
        assert (index.fingerprint, index.split) == (ShardIndex.load(folder).fingerprint, "train")
        again = pickle.loads(pickle.dumps(index))  # as for a worker process that is not forked
        assert read_sample(again, 0, 0, source) == expected[0]


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


def test_evaluation(folder: Path, web: Web, data: DataConfig) -> None:
    keys = [key for pack in held_out_packs(data, SourceConfig("a", f"{web.url}/a"), encode, 16, 2) for key in pack.keys]
    assert sorted(keys) == sorted(sample.key for sample in iterate_samples(SourceConfig.at(folder)))


@pytest.mark.parametrize("faults", [[500], [503, 429, 408], [CUT], [STUCK], [SILENT], [WRONG], [502, WRONG, CUT]])
def test_what_passes_is_tried_again(folder: Path, web: Web, data: DataConfig, faults: list, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUT", 0.3)
    web.faults["a/index.json"] = [fault for fault in faults if fault != WRONG]
    web.faults[FIRST] = list(faults)
    source = SourceConfig.at(f"{web.url}/a")
    expected = [dataclasses.replace(sample, source=source) for sample in iterate_samples(SourceConfig.at(folder))]
    assert list(iterate_samples(source, data=data)) == expected
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
        next(iterate_samples(SourceConfig.at(f"pipe:cat {folder}/{{}}")))


def test_a_manifest_cannot_run_commands(folder: Path, data: DataConfig) -> None:
    name = "a;touch ruined.tar"
    shutil.copy(folder / "00000.tar", folder / name)
    write_index(folder, {name: 37})
    with pytest.raises(DataError, match=r"shard cannot be fetched: .* not a safe name in a shell command"):
        read_sample(ShardIndex.load(f"pipe:cd {folder} && cat {{}}", data), 0, 0)
    assert read_sample(ShardIndex.load(f"file://{folder}", data), 0, 0).key == "a-0-0"
