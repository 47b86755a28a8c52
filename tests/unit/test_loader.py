"""The stream of a rank: its order, its position, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.errors import CheckpointError, ConfigError
from tests.support.loading import (
    COUNTS,
    DATA,
    Identity,
    encode,
    encode_picture,
    loaders,
    states_of,
    take,
    two_sources,
)
from tests.support.tars import encoded_as, picture, write_index, write_tar


@pytest.fixture
def sources(tmp_path: Path) -> tuple[SourceConfig, ...]:
    return two_sources(tmp_path)


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
    whole = {(shard, number) for shard, count in enumerate(COUNTS) for number in range(count)}
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
