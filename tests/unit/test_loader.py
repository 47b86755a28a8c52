import dataclasses
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.decode import decode_image, fit_grid, to_patches
from dsmoe_vl.data.loader import Loader, evaluation_packs
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Sample, Segment
from dsmoe_vl.errors import CheckpointError, ConfigError, DataError
from tests.support.tars import encoded_as, picture, write_index, write_shards, write_tar

DATA = DataConfig(pack_length=64, pack_patches=4, lanes=8, lookahead=4, shuffle_block=8, workers=0)
Identity = tuple[int, int, int, int]  # source, epoch, shard, sample


def encode(sample: Sample) -> list[Segment]:
    """A segment of 6 to 30 tokens that begins with the sample's identity."""
    name, shard, number = sample.key.split("-")
    length = 6 + (int(shard) * 31 + int(number) * 17) % 25
    tokens = np.zeros(length, np.int32)
    tokens[:4] = ord(name[0]) - ord("a"), sample.epoch, int(shard), int(number)
    tokens[4] = torch.get_num_threads()
    return [Segment(task_number("caption"), tokens, tokens.copy(), np.zeros(length, np.int32))]


def encode_picture(sample: Sample) -> list[Segment]:
    """A still image, one token a cell."""
    assert sample.media is not None
    image = decode_image(sample.media)
    grid = fit_grid(image.shape[1], image.shape[0], 8, 2, 16)
    cells = np.arange(grid[0] * grid[1] // 4, dtype=np.int32)
    tokens = np.full(len(cells), 5, np.int32)
    image_modality = np.full(len(cells), Modality.IMAGE, np.int32)
    pictures = [Picture(to_patches(image, grid, 8, 2), grid, -1.0, cells)]
    return [Segment(task_number("caption"), tokens, tokens, image_modality, pictures)]


def encode_with_a_bug(sample: Sample) -> list[Segment]:
    raise ZeroDivisionError("a bug in encode")


def refuse(sample: Sample) -> list[Segment]:
    raise DataError(f"image cannot be decoded: {sample.key}")


def identities(batch: Batch) -> list[Identity]:
    starts = batch.cu_segments[:-1].tolist()
    rows = [batch.tokens[start : start + 4].tolist() for start in starts if batch.real[start]]
    return [(source, epoch, shard, number) for source, epoch, shard, number in rows]


@pytest.fixture
def sources(tmp_path: Path) -> tuple[SourceConfig, ...]:
    write_shards(tmp_path / "a", [37, 0, 64, 12])
    write_shards(tmp_path / "b", [5])
    return (SourceConfig("a", str(tmp_path / "a"), 3.0), SourceConfig("b", str(tmp_path / "b"), 1.0))


def loaders(
    sources: tuple[SourceConfig, ...], ranks: int, workers: int = 0, packs_a_step: int = 8, seed: int = 1
) -> list[Loader]:
    """All ranks of one topology; a step has `packs_a_step` packs whatever the number of ranks."""
    data = dataclasses.replace(DATA, workers=workers)
    return [
        Loader(data, sources, encode, 16, 2, seed, rank, ranks, micro_batch=2, accumulation=packs_a_step // 2 // ranks)
        for rank in range(ranks)
    ]


def take(world: list[Loader], steps: int) -> list[list[Identity]]:
    """What all ranks together see in each of the next steps, sorted; workers are ended."""
    streams = [iter(loader) for loader in world]
    seen = []
    for _ in range(steps):
        batches = [batch for stream in streams for batch in next(stream)]
        seen.append(sorted(one for batch in batches for one in identities(batch)))
    for loader in world:
        loader.close()
    return seen


def states_of(world: list[Loader]) -> list[dict]:
    return json.loads(json.dumps([loader.state_dict() for loader in world]))


@pytest.mark.parametrize(
    "topologies",
    [
        [(1, 0), (2, 0)],
        [(2, 0), (1, 0)],
        [(1, 2), (2, 1), (1, 0)],
        [(2, 2), (1, 1), (2, 0)],
        [(4, 0), (1, 0), (2, 1)],
    ],
    ids=str,
)
def test_stopped_and_continued_elsewhere_is_the_same_stream(
    sources: tuple[SourceConfig, ...], topologies: list[tuple[int, int]]
) -> None:
    total = 21
    unbroken = take(loaders(sources, 1), total)
    rng = np.random.default_rng(len(topologies) + topologies[0][0])
    broken: list[list[Identity]] = []
    states = None
    for i, (ranks, workers) in enumerate(topologies):
        world = loaders(sources, ranks, workers)
        if states is not None:
            for loader in world:
                loader.load_state_dict(states)
        left = total - len(broken)
        broken += take(world, left if i == len(topologies) - 1 else int(rng.integers(1, left // 2)))
        states = states_of(world)
    assert broken == unbroken

    drawn = Counter(one for step in unbroken for one in step)
    assert set(drawn.values()) == {1}
    whole = {(shard, number) for shard, count in enumerate([37, 0, 64, 12]) for number in range(count)}
    assert {one[2:] for one in drawn if one[:2] == (0, 0)} == whole
    for epoch in range(3):
        assert {one[2:] for one in drawn if one[:2] == (1, epoch)} == {(0, number) for number in range(5)}


@pytest.mark.parametrize("workers", [0, 2])
def test_same_topology_continues_bit_for_bit(sources: tuple[SourceConfig, ...], workers: int) -> None:
    (unbroken,), (stopped,), (resumed,) = (loaders(sources, 1, workers) for _ in range(3))
    expected = [step for _, step in zip(range(7), unbroken, strict=False)]
    for _ in zip(range(3), stopped, strict=False):
        pass
    state = states_of([stopped])
    random_state = torch.get_rng_state()
    resumed.load_state_dict(state)
    for step, (before, after) in enumerate(zip(expected[3:], resumed, strict=False)):
        for one, other in zip(before, after, strict=True):
            for name, value in vars(one).items():
                np.testing.assert_array_equal(value, getattr(other, name), err_msg=f"step {step}, {name}")
    assert torch.equal(torch.get_rng_state(), random_state)
    for loader in (unbroken, stopped, resumed):
        loader.close()


def test_iterating_again_continues(sources: tuple[SourceConfig, ...]) -> None:
    (loader,) = loaders(sources, 1)
    assert take([loader], 2) + take([loader], 3) == take(loaders(sources, 1), 5)


def test_batches_have_the_asked_shape(sources: tuple[SourceConfig, ...]) -> None:
    loader = Loader(DATA, sources, encode, 16, 2, seed=1, rank=0, ranks=1, micro_batch=3, accumulation=2)
    step = next(iter(loader))
    assert [batch.tokens.shape for batch in step] == [(3 * 64,)] * 2
    assert all(batch.counts["tokens"] == int(batch.real.sum()) for batch in step)
    assert sum(batch.counts["tokens"] for batch in step) > 0.8 * 6 * 64
    report = loader.report()
    assert report["a/samples"] > report["b/samples"] > 0
    assert report["a/errors"] == 0


def test_seeds_differ(sources: tuple[SourceConfig, ...]) -> None:
    assert take(loaders(sources, 1, seed=1), 1) != take(loaders(sources, 1, seed=2), 1)


def test_workers_have_one_thread_and_end(sources: tuple[SourceConfig, ...]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (loader,) = loaders(sources, 1, workers=2)
        batch = next(iter(loader))[0]
        starts = batch.cu_segments[:-1][batch.real[batch.cu_segments[:-1].long()]]
        assert set(batch.tokens[starts.long() + 4].tolist()) == {1}
        assert len(multiprocessing.active_children()) == 2
        loader.close()
        assert not multiprocessing.active_children()
    finally:
        torch.set_num_threads(before)


def test_a_worker_does_not_collect_what_it_inherits(sources: tuple[SourceConfig, ...], tmp_path: Path) -> None:
    """FFmpeg's coders have threads, which a fork does not carry over; freed in a worker, they would wait for them."""

    class Inherited:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / f"deleted by {os.getpid()}").touch()

    def collect(sample: Sample) -> list[Segment]:
        gc.collect()
        return encode(sample)

    gc.disable()
    try:
        Inherited()
        data = dataclasses.replace(DATA, workers=1)
        loader = Loader(data, sources, collect, 16, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1)
        next(iter(loader))
        loader.close()
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.glob("deleted by *")] == [f"deleted by {os.getpid()}"]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_end_the_run_with_their_message(sources: tuple[SourceConfig, ...], workers: int) -> None:
    data = dataclasses.replace(DATA, workers=workers)
    loader = Loader(data, sources, refuse, 16, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1)
    with pytest.raises(
        DataError, match=r"^data\.sources, a: 2 of 2 samples are bad, .*: image cannot be decoded: a-"
    ) as error:
        next(iter(loader))
    assert "Traceback" not in str(error.value)
    assert loader.report()["a/errors"] == 2
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_not_taken_for_a_bad_sample(sources: tuple[SourceConfig, ...], workers: int) -> None:
    data = dataclasses.replace(DATA, workers=workers)
    loader = Loader(data, sources, encode_with_a_bug, 16, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1)
    with pytest.raises(ZeroDivisionError, match="a bug in encode"):
        next(iter(loader))
    loader.close()


def test_bad_samples_are_skipped_and_listed(tmp_path: Path) -> None:
    photo = encoded_as(picture(64, 64), "JPEG")
    contents = [photo, b"", b"not a picture", photo[: len(photo) // 2], photo, photo]
    members = [(f"k-{i}.jpg", data) for i, data in enumerate(contents)]
    whole = write_tar(tmp_path / "s" / "a.tar", members)
    (tmp_path / "s" / "b.tar").write_bytes(whole.read_bytes()[: 512 + len(photo)])
    data = dataclasses.replace(DATA, pack_patches=64, max_bad_fraction=0.9, lanes=1)
    source = SourceConfig("photos", str(tmp_path / "s"))
    loader = Loader(
        data, (source,), encode_picture, 8, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1,
        quarantine=tmp_path / "quarantine.jsonl",
    )  # fmt: skip
    keys: Counter[str] = Counter()
    for _, (batch,) in zip(range(20), loader, strict=False):
        assert batch.patches.any()
        keys.update(batch.keys)
    assert set(keys) == {"k-0", "k-4", "k-5"}
    assert max(keys.values()) - min(keys.values()) <= 1
    listed = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {(bad["shard"], bad["sample"]) for bad in listed} == {("a.tar", 1), ("a.tar", 2), ("a.tar", 3), ("b.tar", 0)}
    report = loader.report()
    assert report["photos/errors/image cannot be decoded"] == 3 * report["photos/errors/damaged shard"]


def test_lanes_must_be_dealt_evenly(sources: tuple[SourceConfig, ...]) -> None:
    data = dataclasses.replace(DATA, workers=3)
    with pytest.raises(
        ConfigError, match=r"data\.lanes = 8 is not a multiple of 2 .* x 3 workers; set data\.lanes to 12"
    ):
        Loader(data, sources, encode, 16, 2, seed=1, rank=0, ranks=2, micro_batch=1, accumulation=1)


@pytest.mark.parametrize("broken", ["none", "double", "weight"])
def test_unusable_sources(sources: tuple[SourceConfig, ...], broken: str) -> None:
    wrong = {
        "none": (),
        "double": (sources[0], sources[0]),
        "weight": (dataclasses.replace(sources[0], weight=0.0),),
    }[broken]
    with pytest.raises(ConfigError, match=r"data\.sources"):
        Loader(DATA, wrong, encode, 16, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1)


def test_a_changed_order_is_refused(sources: tuple[SourceConfig, ...], tmp_path: Path) -> None:
    (loader,) = loaders(sources, 1)
    take([loader], 1)
    states = states_of([loader])
    with pytest.raises(CheckpointError, match=r"run\.seed was 1 when the checkpoint was written and is 2 now"):
        loaders(sources, 1, seed=2)[0].load_state_dict(states)
    write_tar(tmp_path / "b" / "00001.tar", [("b-1-0.jpg", b"")])
    write_index(tmp_path / "b", {"00000.tar": 5, "00001.tar": 1})
    with pytest.raises(CheckpointError, match=r"data\.sources was"):
        loaders(sources, 1)[0].load_state_dict(states)


def test_states_that_do_not_belong_together_are_refused(sources: tuple[SourceConfig, ...]) -> None:
    first, second = world = loaders(sources, 2)
    take([first], 1)
    take([second], 2)
    with pytest.raises(CheckpointError, match="not of one step"):
        first.load_state_dict(states_of(world))
    with pytest.raises(CheckpointError, match="two ranks"):
        first.load_state_dict(states_of([first, first]))
    with pytest.raises(CheckpointError, match="no data state"):
        first.load_state_dict([])


class Together:
    """The maximum over threads that stand for ranks."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.values: dict[int, int] = {}

    def maximum(self, rank: int, value: int) -> int:
        self.values[rank] = value
        self.barrier.wait()
        largest = max(self.values.values())
        self.barrier.wait()
        return largest


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sees_every_sample_once(sources: tuple[SourceConfig, ...], ranks: int) -> None:
    together = Together(ranks)
    packs: dict[int, list] = {}

    def pass_over(rank: int) -> None:
        packs[rank] = list(
            evaluation_packs(DATA, sources[0], encode, 16, 2, rank, ranks, lambda value: together.maximum(rank, value))
        )

    threads = [threading.Thread(target=pass_over, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(packs) == list(range(ranks))
    assert len({len(one) for one in packs.values()}) == 1
    keys = Counter(key for one in packs.values() for pack in one for key in pack.keys)
    assert keys == {f"a-{shard}-{i}": 1 for shard, count in enumerate([37, 0, 64, 12]) for i in range(count)}


def test_evaluation_fills_up_with_packs_without_labels(sources: tuple[SourceConfig, ...]) -> None:
    answers = iter([1] * 30 + [0])
    *_, last = evaluation_packs(DATA, sources[1], encode, 16, 2, maximum=lambda value: next(answers))
    assert (last.keys, set(last.counts.values())) == ([], {0})
    assert (last.labels == IGNORE).all()


@pytest.mark.parametrize("encode_name", ["encode", "encode_with_a_bug"])
def test_a_process_that_fails_with_an_open_loader_ends(
    encode_name: str, sources: tuple[SourceConfig, ...], tmp_path: Path
) -> None:
    """Also where the error came out of the stream and is kept, and with it the stream."""
    script = tmp_path / "fail.py"
    paths = [(source.name, str(source.path)) for source in sources]
    script.write_text(
        "import dataclasses\n"
        f"from tests.unit.test_loader import DATA, SourceConfig, {encode_name}\n"
        "from dsmoe_vl.data.loader import Loader\n"
        f"sources = tuple(SourceConfig(name, path) for name, path in {paths!r})\n"
        "data = dataclasses.replace(DATA, workers=1)\n"
        f"loader = Loader(data, sources, {encode_name}, 16, 2, 1, 0, 1, micro_batch=1, accumulation=1)\n"
        "try:\n"
        "    next(iter(loader))\n"
        "except ZeroDivisionError as error:\n"
        "    kept = error\n"
        "    loader.close()\n"
        "raise RuntimeError('the end')\n"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(root)}, timeout=60, check=False
    )
    assert ended.returncode == 1
