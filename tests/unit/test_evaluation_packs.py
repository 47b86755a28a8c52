"""One pass over held-out samples."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.held_out_packs import held_out_packs
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import IGNORE, Segment
from tests.support.loading import (
    COUNTS,
    DATA,
    encode,
    two_sources,
)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[SourceConfig, ...]:
    return two_sources(tmp_path)


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
            held_out_packs(DATA, sources[0], encode, 16, 2, rank, ranks, lambda value: together.maximum(rank, value))
        )

    threads = [threading.Thread(target=pass_over, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(packs) == list(range(ranks))
    assert len({len(one) for one in packs.values()}) == 1
    keys = Counter(key for one in packs.values() for pack in one for key in pack.keys)
    assert keys == {f"a-{shard}-{i}": 1 for shard, count in enumerate(COUNTS) for i in range(count)}


def test_evaluation_fills_up_with_packs_without_labels(sources: tuple[SourceConfig, ...]) -> None:
    answers = iter([1] * 30 + [0])
    *_, last = held_out_packs(DATA, sources[1], encode, 16, 2, maximum=lambda value: next(answers))
    assert (last.keys, set(last.counts.values())) == ([], {0})
    assert (last.labels == IGNORE).all()


def test_samples_have_the_settings_of_their_own_source(sources: tuple[SourceConfig, ...]) -> None:
    """A held-out source may have the name of a training source and other settings."""
    held_out = replace(sources[0], tasks=("summary",))
    seen: set[tuple[str, SourceConfig]] = set()

    def noted(sample: Sample) -> list[Segment]:
        seen.add((sample.key[0], sample.source))
        return encode(sample)

    list(held_out_packs(DATA, held_out, noted, 16, 2))
    assert seen == {("a", held_out)}
    seen.clear()
    list(islice(Loader(DATA, sources, noted, 16, 2, 1, 0, 1, 1, 1), 20))
    assert seen == {("a", sources[0]), ("b", sources[1])}
