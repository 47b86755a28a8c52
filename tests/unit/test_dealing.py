"""Samples dealt to ranks, which are threads here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation import retrieval
from dsmoe_vl.evaluation.dealing import Dealt
from dsmoe_vl.evaluation.scalars import write_scalars
from tests.support.samples import sample
from tests.support.threads import Threads


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_result_once_and_in_order(count):
    samples = [replace(sample("image"), key=str(i)) for i in range(7)]

    def work(dealer):
        own = [None if one.key == "3" else one for one in samples[dealer.rank :: dealer.count]]
        dealt = Dealt(own, dealer, failed=lambda number, reason, key: None)
        return dealer.merge([(dealt.number(one), one.key) for one in dealt])

    assert Threads(count).run(work) == [["0", "1", "2", "4", "5", "6"]] * count


def gallery_oracle(contents, readable, size):
    chosen, seen = [], set()
    for number, content in enumerate(contents):
        if len(chosen) < size and content not in seen and readable[number]:
            seen.add(content)
            chosen.append(number)
    return chosen


@pytest.mark.parametrize("seed", range(12))
def test_the_gallery_is_that_of_one_rank(monkeypatch, seed):
    """Whatever cannot be read or shows the same as another, and wherever it lies."""
    rng = np.random.default_rng(seed)
    total, size = int(rng.integers(1, 40)), int(rng.integers(1, 25))
    contents, readable = rng.integers(0, 25, total).tolist(), (rng.random(total) < 0.7).tolist()
    plain = sample("image")
    samples = [replace(plain, key=str(i), meta={"content": f"c{content}"}) for i, content in enumerate(contents)]

    def embed(trained, one, pair):
        if not readable[int(one.key)]:
            raise DataError("broken")
        return retrieval._Shown(pair, np.zeros((1, 1)), [one.key])

    monkeypatch.setattr(retrieval, "_embed_sample", embed)
    for count in (1, 2, 3):

        def work(dealer):
            own = iter(samples[dealer.rank :: dealer.count])
            drawn = []
            watched = (drawn.append(int(one.key)) or one for one in own)
            shown = retrieval._gallery(None, watched, size, dealer, lambda one, error: None)
            return [int(one.captions[0]) for one in shown], drawn

        oracle = gallery_oracle(contents, readable, size)
        found = Threads(count).run(work)
        assert [shown for shown, _ in found] == [oracle] * count
        read = sorted(number for _, drawn in found for number in drawn)  # by any rank: no more than one rank needs
        assert read == list(range(oracle[-1] + 1 if len(oracle) == size else total))


def test_scalars_of_folders_with_one_name(tmp_path):
    write_scalars(tmp_path, 7, {"a/val": {"caption": {"x": 1}}, "b/val/": {"caption": {"x": 2.5}}})
    found = {}
    for folder in tmp_path.iterdir():
        (point,) = EventAccumulator(str(folder)).Reload().Scalars("eval/caption/x")
        found[folder.name] = (point.step, point.value)
    assert found == {"val": (7, 1.0), "val_2": (7, 2.5)}
