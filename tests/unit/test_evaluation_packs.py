"""One pass over held-out samples."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.held_out_packs import held_out_packs
from dsmoe_vl.data.segment import IGNORE
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
