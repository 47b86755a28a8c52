"""Ranks that read are killed without warning and continued in other numbers: no sample is lost, none is repeated."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.synthetic.films import encode_mp4, film
from data_tools.synthetic.scenes import scene
from data_tools.tokenizer.train import train as train_tokenizer
from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from tests.distributed.ranks import REPOSITORY, cpu_environment
from tests.distributed.stream_reader import (
    Identity,
    Reading,
    Run,
    Topology,
    newest_step,
    open_loader,
    packs_of,
    read,
)
from tests.support.tars import Member, picture, write_index, write_tar

LIMIT_SECONDS = 60  # of one life
SHARDS = {"photos": [33, 0, 21, 16], "texts": [30, 15], "clips": [2, 1]}  # samples
BAD = {("photos", 0, 17), ("photos", 2, 0), ("photos", 3, 15), ("texts", 1, 5)}  # source, shard, sample
Processes = list[tuple[BaseProcess, Connection]]


@dataclass
class Expected:
    """The run that nobody interrupts."""

    packs: list[tuple[list[Identity], int]] = field(default_factory=list)  # samples and fingerprint of each
    bad: list[set[tuple[Any, ...]]] = field(default_factory=list)  # quarantined when so many packs were consumed
    stop: int = 0  # packs after which the largest source's first epoch is complete, and so are most of the others'
    complete: dict[int, int] = field(default_factory=dict)  # by source, how many epochs are complete then


@pytest.fixture(scope="module", autouse=True)
def warm_start() -> Iterator[None]:
    """Ranks are forked from a process that has imported everything, so that they start in no time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cpu_environment(PYTHONPATH=str(REPOSITORY)).items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.stream_reader"])
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions, texts alone, and a few videos; some cannot be decoded. And their tokenizer."""
    folder = tmp_path_factory.mktemp("elastic")
    rng = np.random.default_rng(0)
    for source, counts in SHARDS.items():
        for shard, count in enumerate(counts):
            members = [member for number in range(count) for member in sample_files(rng, source, shard, number)]
            write_tar(folder / source / f"{shard}.tar", members)
        write_index(folder / source, {f"{shard}.tar": count for shard, count in enumerate(counts)})
    train_tokenizer([folder / "clips"], folder / "tokenizer.model", vocab_size=300)
    return folder


def sample_files(rng: np.random.Generator, source: str, shard: int, number: int) -> list[Member]:
    key = f"{source}-{shard}-{number}"
    bad = (source, shard, number) in BAD
    if source == "texts":
        return [(f"{key}.txt", b"x" * int(rng.integers(100))), (f"{key}.json", b"{" if bad else b"{}")]
    media, meta = (scene if source == "photos" else film)(rng, False, 48, 2)
    if source == "clips":  # its frames would take most of the time
        media = encode_mp4([picture(32, 32, number + i) for i in range(4)])
    name = f"{key}.{'jpg' if source == 'photos' else 'mp4'}"
    text = meta["captions"][0].encode()
    return [(name, media[:200] if bad else media), (f"{key}.txt", text), (f"{key}.json", json.dumps(meta).encode())]


def random_run(rng: np.random.Generator, shards: Path) -> Run:
    """Photos are the largest source by epochs too: all others begin anew sooner."""
    weights = {"photos": 6.0, "texts": rng.uniform(4, 8), "clips": rng.uniform(0.3, 1.0)}
    data = DataConfig(
        sources=tuple(SourceConfig(name, str(shards / name), float(weight)) for name, weight in weights.items()),
        temperature=float(rng.choice([1.0, 1.2])),
        pack_length=int(rng.choice([256, 320])),
        pack_patches=int(rng.choice([96, 160])),
        image_max_patches=16,
        frame_max_patches=4,
        video_frames=2,
        frame_pool=1,
        lanes=int(rng.choice([8, 16, 24])),
        lookahead=int(rng.choice([2, 6, 12])),
        shuffle_block=int(rng.choice([1, 4, 16])),
        max_bad_fraction=0.2,
    )
    return Run(data, int(rng.integers(1000)), shards / "tokenizer.model")


def random_topology(rng: np.random.Generator, before: Topology | None) -> Topology:
    """Each differs from the one before in its ranks or workers, and as often as not in the size of a step."""
    while True:
        ranks, workers = int(rng.choice([1, 2])), int(rng.choice([0, 1, 2, 4]))
        if before is None or (ranks, workers) != (before.ranks, before.workers):
            return Topology(ranks, workers, int(rng.integers(1, 4)))


def unbroken(run: Run, folder: Path, margin: int = 16) -> Expected:
    """One rank without workers, pack by pack, until all that `Expected.stop` asks for is seen, and `margin` packs more.

    Fails where that takes far more samples than there are.
    """
    quarantine = folder / "unbroken.jsonl"
    loader = open_loader(run, Topology(1, 0, 1), 0, quarantine)
    expected = Expected(bad=[set()])
    seen: Counter[tuple[int, int]] = Counter()  # by source and epoch, bad samples included
    sizes = [sum(counts) for counts in SHARDS.values()]
    for ((_, samples, crc),) in itertools.islice(packs_of(loader, 0, 1), 500):
        expected.packs.append((samples, crc))
        expected.bad.append(quarantined([quarantine]))
        seen.update(sample[:2] for sample in samples)
        seen.update((list(SHARDS).index(one[0]), one[3]) for one in expected.bad[-1] - expected.bad[-2])
        if not expected.complete and seen[0, 0] == sizes[0]:
            expected.complete = {0: 1} | {
                source: max(1, *(epoch for other, epoch in seen if other == source)) for source in (1, 2)
            }
        if expected.complete and not expected.stop:
            missing = [
                (source, epoch)
                for source, epochs in expected.complete.items()
                for epoch in range(epochs)
                if seen[source, epoch] < sizes[source]
            ]
            expected.stop = 0 if missing else len(expected.packs)
        if expected.stop and len(expected.packs) == expected.stop + margin:
            return expected
    raise AssertionError(f"after {len(expected.packs)} packs samples are missing: {seen} of {sizes}")


def quarantined(files: list[Path]) -> set[tuple[Any, ...]]:
    lines = [json.loads(line) for path in files if path.exists() for line in path.read_text().splitlines()]
    return {(line["source"], line["shard"], line["sample"], line["epoch"], line["reason"]) for line in lines}


def start_ranks(
    run: Run, topology: Topology, folder: Path, states: list[dict], stop: int, pause: float, start_method: str = "fork"
) -> Processes:
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    processes: Processes = []
    for rank in range(topology.ranks):
        ours, theirs = context.Pipe(duplex=False)
        reading = Reading(folder, rank, states, stop, pause, LIMIT_SECONDS, start_method)
        process = context.Process(target=read, args=(run, topology, reading, theirs))
        process.start()
        theirs.close()
        processes.append((process, ours))
    return processes


def wait_for(condition: Any, processes: Processes, folder: Path) -> None:
    """Fails with what the ranks wrote once they have had their time."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, errors(folder)
        time.sleep(0.005)


def errors(folder: Path) -> str:
    return "\n".join(f"--- {path}\n{path.read_text()[-4000:]}" for path in sorted(folder.glob("out_*")))


def kill(processes: Processes, rng: np.random.Generator) -> None:
    """In any order, and as often as not with time between the first and the second for another save."""
    for i in rng.permutation(len(processes)):
        pid = processes[i][0].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        time.sleep(float(rng.choice([0, rng.uniform(0, 0.02)])))


def consumed_by(folder: Path, ranks: int, step: int) -> list[tuple[int, list[Identity], int]]:
    """The packs of all ranks' steps up to `step`, which all have saved; the last line of a log may be cut."""
    packs = []
    for rank in range(ranks):
        lines = (folder / f"log_{rank}.jsonl").read_text().splitlines()[:step] if step else []
        steps = [json.loads(line) for line in lines]
        assert [line["step"] for line in steps] == list(range(1, step + 1))
        packs += [(n, [tuple(one) for one in samples], crc) for line in steps for n, samples, crc in line["packs"]]
    return packs


@pytest.mark.timeout(3 * LIMIT_SECONDS)
@pytest.mark.parametrize("number", range(20))
def test_killed_at_random_and_continued_elsewhere(number: int, shards: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng([42, number])
    run = random_run(rng, shards)
    expected = unbroken(run, tmp_path)
    consumed: dict[int, tuple[list[Identity], int]] = {}
    states: list[dict] = []
    topology: Topology | None = None
    lives = int(rng.integers(3, 5))
    for life in range(lives):
        folder = tmp_path / str(life)
        topology = random_topology(rng, topology)
        processes = start_ranks(run, topology, folder, states, expected.stop, pause=float(rng.choice([0, 0.004])))
        last = life == lives - 1
        if not last:
            packs_left = expected.stop - len(consumed)
            steps_left = packs_left / topology.ranks / topology.accumulation
            after = int(rng.uniform(0, 2 * steps_left / (lives - life)))  # steps of any rank; 0: while they start
            ended = lambda: any(process.exitcode is not None for process, _ in processes)  # noqa: B023, E731
            saved = lambda: len(list(folder.glob("state_*_?.json")))  # noqa: B023, E731
            wait_for(lambda: ended() or saved() >= after * topology.ranks, processes, folder)  # noqa: B023
            time.sleep(rng.uniform(0, 0.02))
            kill(processes, rng)
        for process, alive in processes:
            process.join(LIMIT_SECONDS + 5)
            assert process.exitcode in ((0,) if last else (0, -signal.SIGKILL)), errors(folder)
            assert alive.poll(15), "workers outlive their rank"
            alive.close()
        step = newest_step(folder, topology.ranks)
        packs = consumed_by(folder, topology.ranks, step)
        assert not consumed.keys() & {n for n, *_ in packs}
        consumed |= {n: (samples, crc) for n, samples, crc in packs}
        if step:
            paths = [folder / f"state_{step:04d}_{rank}.json" for rank in range(topology.ranks)]
            states = [json.loads(path.read_text()) for path in paths]

    assert sorted(consumed) == list(range(len(consumed)))
    assert len(consumed) >= expected.stop
    for n, pack in sorted(consumed.items()):
        assert pack == expected.packs[n], f"pack {n}"
    drawn = Counter(one for samples, _ in consumed.values() for one in samples)
    assert set(drawn.values()) == {1}
    for source, (name, counts) in enumerate(SHARDS.items()):
        whole = {(shard, i) for shard, n in enumerate(counts) for i in range(n) if (name, shard, i) not in BAD}
        for epoch in range(expected.complete[source]):
            assert {one[2:] for one in drawn if one[:2] == (source, epoch)} == whole, f"{name}, epoch {epoch}"
    listed = quarantined(list(tmp_path.glob("*/quarantine_*.jsonl")))
    for source, shard, sample in BAD:
        epochs = {one[3] for one in listed if one[:3] == (source, f"{shard}.tar", sample)}
        assert epochs >= set(range(expected.complete[list(SHARDS).index(source)])), (source, shard, sample)
    assert expected.bad[len(consumed)] <= listed <= expected.bad[-1]


@pytest.fixture
def endless(shards: Path) -> Run:
    return random_run(np.random.default_rng(0), shards)


def first_workers(process: BaseProcess, folder: Path) -> list[int]:
    """The workers of a rank that is alone, once they have given it some steps."""
    log = folder / "log_0.jsonl"
    lines = lambda: log.read_text().splitlines() if log.exists() else []  # noqa: E731
    wait_for(lambda: len(lines()) > 3 or process.exitcode is not None, [], folder)
    assert process.exitcode is None, errors(folder)
    return json.loads(lines()[0])["workers"]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_end_with_a_killed_rank(start_method: str, endless: Run, tmp_path: Path) -> None:
    """However they were started: with Python 3.14 the default has changed."""
    folder = tmp_path / "0"
    ((process, _),) = start_ranks(endless, Topology(1, 2, 1), folder, [], 10**6, 0.01, start_method)
    workers = first_workers(process, folder)
    assert len(workers) == 2 and all(running(pid) for pid in workers)
    process.kill()
    process.join()
    try:
        wait_for(lambda: not any(running(pid) for pid in workers), [], folder)
    finally:
        for pid in filter(running, workers):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", range(6))
def test_a_rank_ends_with_a_killed_worker(number: int, endless: Run, tmp_path: Path) -> None:
    """It does not wait for what will never come, nor skip it; a worker may die while it sends a pack."""
    folder = tmp_path / "0"
    large = replace(endless, data=replace(endless.data, pack_patches=4096))  # mostly unused, but sent
    ((process, alive),) = start_ranks(large, Topology(1, 2, 1), folder, [], 10**6, 0.0)
    os.kill(first_workers(process, folder)[number % 2], signal.SIGKILL)
    process.join(LIMIT_SECONDS)
    assert process.exitcode == 1, errors(folder)
    assert "killed by signal" in errors(folder)
    assert alive.poll(15), "the other worker outlives its rank"
    steps = [json.loads(line) for line in (folder / "log_0.jsonl").read_text().splitlines()]
    assert [n for step in steps for n, *_ in step["packs"]] == list(range(len(steps)))
