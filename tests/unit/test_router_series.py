"""The routers' flight recorder: nothing is lost by joining, resuming or reading back; and its pictures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dsmoe_vl.config.model import ModelConfig, MoEConfig
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.drawing.heatmap import load_scale, rising_scale
from dsmoe_vl.errors import DataError
from dsmoe_vl.moe.stats import GATE_BINS, RoutingSums, max_violation
from dsmoe_vl.monitor.recorder import RouterRecorder
from dsmoe_vl.monitor.router import draw_record, draw_run
from dsmoe_vl.monitor.router_series import RECORDS_AT_MOST, RouterSeries

RECIPE = Recipe(model=ModelConfig(layers=3), moe=MoEConfig(experts=4, experts_per_layer=(2, 4), first_dense_layers=1))


def routing(seed):
    """Random sums of a step with two layers, of two and four experts, and its counts."""
    generator = torch.Generator().manual_seed(seed)
    load = torch.randint(0, 50, (2, 3, 3, 4), generator=generator).float()
    load[0, ..., 2:] = 0
    gates = torch.zeros(2, GATE_BINS)
    gates[:, 9] = load.sum((1, 2, 3))
    violation = max_violation(load.sum((1, 2)), torch.tensor([2, 4]))
    counts = {"tokens_text": 100, "tokens_image": 200 + seed, "tokens_video": 0}
    return RoutingSums(load, torch.rand(2, 3, generator=generator), torch.tensor([0.0, 7.0]), gates, violation), counts


def recorder(folder, first_step=0):
    return RouterRecorder(SimpleNamespace(run_dir=folder, recipe=RECIPE), first_step)


def written(folder, steps=6, every=2):
    """A file of some steps, and the series that it holds."""
    records = recorder(folder)
    for step in range(1, steps + 1):
        records.add(*routing(step))
        if step % every == 0:
            records.record(step)
    return RouterSeries.load_from(folder / "router.npz")


def test_counts_are_exact_and_in_their_intervals(tmp_path):
    series = written(tmp_path)
    assert list(series.step) == [2, 4, 6] and list(series.steps) == [2, 2, 2]
    expected = [sum(routing(step)[0].load.long().numpy() for step in steps) for steps in ((1, 2), (3, 4), (5, 6))]
    assert np.array_equal(series.load, np.stack(expected))
    assert series.tokens.tolist() == [[200, 403, 0], [200, 407, 0], [200, 411, 0]]
    assert np.array_equal(series.gates.sum(-1), series.load.sum((2, 3, 4)))
    assert series.dropped.tolist() == [[0, 14]] * 3


def test_large_counts_stay_exact(tmp_path):
    """More than float32 tells apart."""
    records = recorder(tmp_path)
    sums, counts = routing(1)
    large = sums._replace(load=torch.full_like(sums.load, 2.0**24))
    for _ in range(3):
        records.add(large, counts)
        records.add(sums._replace(load=torch.ones_like(sums.load)), counts)
    assert (records.record(6).load == 3 * 2**24 + 3).all()


def test_a_continued_run_replaces_the_steps_that_it_takes_again(tmp_path):
    before = written(tmp_path, steps=6)
    records = recorder(tmp_path, first_step=4)
    records.add(*routing(9))
    records.record(5)
    series = RouterSeries.load_from(tmp_path / "router.npz")
    assert list(series.step) == [2, 4, 5] and list(series.steps) == [2, 2, 1]
    assert np.array_equal(series.load[:2], before.load[:2])
    assert recorder(tmp_path).record(5) is None  # nothing came
    recorder_of_new_run = recorder(tmp_path)
    recorder_of_new_run.add(*routing(1))
    recorder_of_new_run.record(1)
    assert list(RouterSeries.load_from(tmp_path / "router.npz").step) == [1]


def test_a_long_run_is_joined_at_its_old_end_and_loses_nothing(tmp_path):
    one = written(tmp_path, steps=1, every=1)
    series = RouterSeries.empty((2, 4), GATE_BINS, 3, 3)
    count = 3 * RECORDS_AT_MOST
    for step in range(1, count + 1):
        series = series.with_record(replace(one, step=np.array([step])))
    assert len(series) <= RECORDS_AT_MOST
    assert np.array_equal(np.cumsum(series.steps), series.step) and series.step[-1] == count
    assert np.array_equal(series.load.sum(0), count * one.load[0])
    assert (series.steps[-RECORDS_AT_MOST // 2 :] == 1).all() and series.steps[0] > 2


def test_aggregates_by_hand(tmp_path):
    one = written(tmp_path, steps=1, every=1)
    load = np.zeros_like(one.load)
    load[0, 0, 0, 0, :2] = 30, 10
    load[0, 1, 0, 1, :4] = 40, 0, 0, 0
    found = replace(one, load=load, dropped=np.array([[0, 40]])).of_layers()
    assert found["max_violation"][0].tolist() == [0.5, 3.0]
    assert found["dead_fraction"][0].tolist() == [0.0, 0.75]
    assert found["drop_fraction"][0].tolist() == [0.0, 0.5]
    share = replace(one, load=load).relative_load()[0]
    assert share[0, :2].tolist() == [1.5, 0.5] and np.isnan(share[0, 2:]).all()


def test_a_missing_or_foreign_file_is_the_users_error(tmp_path):
    with pytest.raises(DataError, match=r"run\.router_every"):
        RouterSeries.load_from(tmp_path / "router.npz")
    (tmp_path / "router.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match="not a router"):
        RouterSeries.load_from(tmp_path / "router.npz")
    records = recorder(tmp_path, first_step=5)  # but ends no training
    records.add(*routing(1))
    assert records.record(6) is not None
    assert (tmp_path / "router.unreadable").exists()


def test_colours_say_dead_even_and_overloaded():
    dead, even, over, absent = load_scale().paint(np.array([0.0, 1.0, 100.0, np.nan]))
    assert dead[2] > 2 * dead[0] and over[0] > 2 * over[2]
    assert min(even) > 240 and len(set(absent.tolist())) <= 2
    white, violet = rising_scale("x", 2.0).paint(np.array([0.0, 2.0]))
    assert min(white) == 250 and max(violet) < 120


@pytest.mark.parametrize("draw", [draw_record, draw_run])
def test_pictures_have_room_for_every_panel(draw, tmp_path):
    image = draw(written(tmp_path, steps=20, every=1), 1)
    assert isinstance(image, Image.Image) and image.width < 1200 and image.height > 200
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 50
