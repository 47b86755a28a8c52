"""What a run that continues knows besides its position: how many samples were bad, and which epochs have begun."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.error_log import merge_reports
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.errors import DataError
from tests.support.tars import write_shards

STEP = 2  # packs a step, over all ranks
DATA = DataConfig(pack_length=64, pack_patches=4, lanes=4, lookahead=4, shuffle_block=8, workers=0)
Encode = Callable[[Sample], list[Segment]]


def refusing(*bad: tuple[str, int]) -> Encode:
    """Samples of about ten tokens; those `bad` by source and number cannot be used."""

    def encode(sample: Sample) -> list[Segment]:
        name, _, number = sample.key.split("-")
        if (name, int(number)) in bad:
            raise DataError("refused: by the test")
        tokens = np.full(6 + int(number) % 9, 5, np.int32)
        return [Segment(task_number("caption"), tokens, tokens, np.zeros_like(tokens))]

    return encode


@pytest.fixture
def sources(tmp_path: Path) -> tuple[SourceConfig, ...]:
    write_shards(tmp_path / "large", [400])
    write_shards(tmp_path / "small", [9])
    return SourceConfig("large", str(tmp_path / "large"), 4.0), SourceConfig("small", str(tmp_path / "small"), 1.0)


def ranks_of(
    sources: tuple[SourceConfig, ...], encode: Encode, ranks: int, quarantine: Path | None = None, **settings: float
) -> list[Loader]:
    data = dataclasses.replace(DATA, **settings)
    return [
        Loader(data, sources, encode, 16, 2, 1, rank, ranks, micro_batch=1, accumulation=STEP // ranks,
               quarantine=quarantine and quarantine / f"{rank}.jsonl")
        for rank in range(ranks)
    ]  # fmt: skip


def advance(world: list[Loader], steps: int) -> None:
    """All ranks by so many steps, one rank after another."""
    for loader in world:
        for _ in zip(range(steps), loader, strict=False):
            pass


def states_of(world: list[Loader]) -> list[dict]:
    return json.loads(json.dumps([loader.state_dict() for loader in world]))


def steps_until_refused(loader: Loader, most: int) -> int:
    """Steps that `loader` gives before its budget is spent, at most so many."""
    steps = 0
    try:
        for _ in zip(range(most), loader, strict=False):
            steps += 1
    except DataError as error:
        assert "more than data.max_bad_fraction" in str(error)
    return steps


def keys_of(loader: Loader, steps: int) -> list[list[str]]:
    """The samples of each of the next steps."""
    return [[key for batch in step for key in batch.keys] for _, step in zip(range(steps), loader, strict=False)]


def drawn_of_large(sources: tuple[SourceConfig, ...], steps: int) -> list[int]:
    """Numbers of the large source's samples, in the order in which they occur first."""
    (loader,) = ranks_of(sources, refusing(), 1)
    keys = [key for step in keys_of(loader, steps) for key in step if key.startswith("large")]
    return [int(key.split("-")[2]) for key in dict.fromkeys(keys)]


def test_a_tolerable_run_is_tolerated_wherever_it_continues(sources: tuple[SourceConfig, ...]) -> None:
    """Bad samples that lie close together are few in the whole run, and many since its last start."""
    total = 40
    late = drawn_of_large(sources, total)[-1] // DATA.shuffle_block
    encode = refusing(*(("large", late * DATA.shuffle_block + i) for i in (1, 4, 6)))  # of one block, the last
    (unbroken,) = ranks_of(sources, encode, 1, max_bad_fraction=0.013)
    states = []
    for _ in zip(range(total), unbroken, strict=False):
        states.append(states_of([unbroken]))
    assert unbroken.report()["large/errors"] == 3
    for stop in range(0, total, 2):
        for ranks in (1, 2):
            world = ranks_of(sources, encode, ranks, max_bad_fraction=0.013 * ranks)  # a rank reads its share alone
            for loader in world:
                loader.load_state_dict(states[stop])
            advance(world, total - stop - 1)


def test_an_intolerable_run_ends_where_it_would_have_without_a_stop(sources: tuple[SourceConfig, ...]) -> None:
    """Starting it again and again is no way round the budget."""
    encode = refusing(*(("large", number) for number in drawn_of_large(sources, 48)[200::8]))
    (unbroken,) = ranks_of(sources, encode, 1, max_bad_fraction=0.05)
    ends = steps_until_refused(unbroken, 200)
    assert 20 < ends < 48
    done, states = 0, None
    while True:
        (loader,) = ranks_of(sources, encode, 1, max_bad_fraction=0.05)
        if states:
            loader.load_state_dict(states)
        more = steps_until_refused(loader, 4)
        done, states = done + more, states_of([loader])
        if more < 4 or done > ends:
            break
    assert done == pytest.approx(ends, abs=1)  # samples that wait are read twice, which widens the budget a little


def test_states_without_bad_samples_and_epochs_can_be_continued(sources: tuple[SourceConfig, ...]) -> None:
    """Those of older checkpoints."""
    (first,), (second,) = (ranks_of(sources, refusing(("small", 3)), 1, max_bad_fraction=0.5) for _ in range(2))
    advance([first], 5)
    (state,) = states_of([first])
    del state["epochs"]
    for lane in state["lanes"].values():
        del lane["bad"]
    second.load_state_dict([state])
    advance([second], 1)
    assert second.report()["small/epoch"] >= first.report()["small/epoch"] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_listed_once_an_epoch(sources: tuple[SourceConfig, ...], tmp_path: Path, workers: int) -> None:
    """Also when the run stops and continues with other ranks; they give the same samples in place of the bad ones."""
    bad = {("small", 3), ("large", 77), ("large", 300)}
    encode = refusing(*bad)
    settings = {"max_bad_fraction": 0.5, "workers": workers}
    total, stop = 64, 23
    (unbroken,) = ranks_of(sources, encode, 1, max_bad_fraction=0.5)
    expected = keys_of(unbroken, total)

    (first,) = ranks_of(sources, encode, 1, tmp_path, **settings)
    found = keys_of(first, stop)
    first.close()
    world = ranks_of(sources, encode, 2, tmp_path, **settings)
    for loader in world:
        loader.load_state_dict(states_of([first]))
    for _, *steps in zip(range(total - stop), *world, strict=False):
        found.append([key for step in steps for batch in step for key in batch.keys])
    for loader in world:
        loader.close()
    assert found == expected
    assert not {f"{name}-0-{number}" for name, number in bad} & {key for step in found for key in step}

    lines = [line for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    listed = [tuple(json.loads(line).values()) for line in lines]
    assert len(set(listed)) == len(listed)
    reason = "refused: by the test"
    last = unbroken.report()["small/epoch"]
    assert {("small", "00000.tar", 3, epoch, reason, "small-0-3") for epoch in range(last)} <= set(listed)
    assert {("large", "00000.tar", number, 0, reason, f"large-0-{number}") for number in (77, 300)} <= set(listed)
    assert {one[:3] for one in listed} == {(name, "00000.tar", n) for name, n in bad}


def test_a_cut_quarantine_line_stays_one_line(sources: tuple[SourceConfig, ...], tmp_path: Path) -> None:
    """Where a machine died while it wrote, the next line does not join what is left."""
    path = tmp_path / "0.jsonl"
    path.write_text('{"source": "small", "sha')
    (loader,) = ranks_of(sources, refusing(("small", 3)), 1, tmp_path, max_bad_fraction=0.5)
    advance([loader], 10)
    cut, *whole = path.read_text().splitlines()
    assert cut == '{"source": "small", "sha'
    assert whole and all(json.loads(line)["sample"] == 3 for line in whole)


def test_epochs_are_reported_and_remembered(sources: tuple[SourceConfig, ...]) -> None:
    (alone,) = ranks_of(sources, refusing(), 1)
    assert alone.report() == {}
    epochs = []
    for _ in zip(range(120), alone, strict=False):
        report = alone.report()
        epochs.append((report["large/epoch"], report["small/epoch"]))
    assert epochs == sorted(epochs) and epochs[0] == (0, 0)
    for i, (source, size) in enumerate((("large", 400), ("small", 9))):
        assert epochs[-1][i] == pytest.approx(alone.report()[f"{source}/samples"] / size, abs=1)

    world = ranks_of(sources, refusing(), 2)
    advance(world, 60)
    merged = merge_reports([loader.report() for loader in world])
    assert (merged["large/epoch"], merged["small/epoch"]) == epochs[59]
    assert merged["small/samples"] == sum(loader.report()["small/samples"] for loader in world)

    (resumed,) = ranks_of(sources, refusing(), 1)
    resumed.load_state_dict(states_of(world))
    assert resumed.report()["small/epoch"] == merged["small/epoch"]  # known before anything is read
    assert resumed.report()["small/samples"] == 0
    for step, _ in enumerate(resumed, 60):
        report = resumed.report()
        assert (report["large/epoch"], report["small/epoch"]) == epochs[step]
        if step == 119:
            break
