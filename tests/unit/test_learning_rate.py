"""Which rate a race suggests, from made outcomes."""

from __future__ import annotations

import math

import pytest
import torch

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.doctor.learning_rate import Outcome, advice, choose, is_lost, loss_by_pack, of_world, sweep

WOBBLE = (0.3, -0.3, 0.1, -0.1)  # of packs, the same for every rate


def outcome(rate, loss, noise=0.0):
    """A finished race; `noise`: how much packs differ from those of other rates."""
    parts = tuple(loss + 10 * wobble + noise * (-1) ** index for index, wobble in enumerate(WOBBLE))
    return Outcome(rate, False, 10, loss, loss, (loss,), 1.0, (parts,))


def diverged(rate):
    return Outcome(rate, True, 3, math.nan)


def test_the_lowest_held_out_loss():
    choice = choose([outcome(4e-3, 2.5), outcome(1e-3, 3.0), outcome(2e-3, 2.4)])
    assert choice.chosen is choice.best and choice.best.rate == 2e-3 and choice.edge == 0
    assert choice.noise == pytest.approx(0.0)  # packs differ, but not between the rates
    (line, honest) = advice(choice, 60, 420)
    assert "= 0.002 in" in line and "60 steps" in honest and "420" in honest


def test_the_smaller_of_two_within_noise():
    choice = choose([outcome(1e-3, 2.45, noise=0.2), outcome(2e-3, 2.4), outcome(4e-3, 3.0)])
    assert (choice.chosen.rate, choice.best.rate) == (1e-3, 2e-3)
    assert choice.noise == pytest.approx(2 * 0.2 * math.sqrt(4 / 3) / math.sqrt(4))
    assert "0.002 is better by 0.0500, but up to 0.2309 is noise" in advice(choice, 60, 420)[1]
    assert choose([outcome(1e-3, 2.7, noise=0.2), outcome(2e-3, 2.4)]).chosen.rate == 2e-3


@pytest.mark.parametrize(("losses", "edge"), [((2.0, 2.1, 2.2), -1), ((2.2, 2.1, 2.0), 1), ((2.2, 2.0, 2.1), 0)])
def test_the_edge_of_the_sweep(losses, edge):
    choice = choose([outcome(rate, loss) for rate, loss in zip((1e-3, 2e-3, 4e-3), losses, strict=True)])
    assert choice.edge == edge
    assert any("try --rates" in line for line in advice(choice, 60, 420)) == bool(edge)


def test_a_rate_that_diverges_is_no_choice_but_bounds_the_sweep():
    choice = choose([outcome(1e-3, 3.0), outcome(2e-3, 2.0), diverged(4e-3)])
    assert choice.chosen.rate == 2e-3 and choice.edge == 0
    assert choose([diverged(1e-3), diverged(2e-3)]) is None


def test_a_sweep_goes_on_beyond_its_edge():
    falling = sweep([1e-3, 2e-3], lambda rate: outcome(rate, 1 / rate), extend=True)
    assert [found.rate for found in falling] == [1e-3, 2e-3, 4e-3, 8e-3]
    inside = sweep([1e-3, 2e-3], lambda rate: outcome(rate, abs(rate - 2e-3)), extend=True)
    assert [found.rate for found in inside] == [1e-3, 2e-3, 4e-3]
    assert len(sweep([1e-3, 2e-3], lambda rate: outcome(rate, 1 / rate), extend=False)) == 2
    assert [found.rate for found in sweep([4e-3], diverged, extend=True)] == [4e-3, 2e-3, 1e-3]


def test_a_term_that_begins_later_is_no_divergence():
    first = {"retrieval": 1.3, "caption": 10.4, "balancing": 0.05}
    assert not is_lost({"retrieval": 1.3, "caption": 10.4, "balancing": 0.05}, first)
    assert not is_lost({"retrieval": 3.5, "balancing": 0.05}, first) and is_lost({"retrieval": 4.1}, first)
    assert is_lost({"retrieval": 1.3, "caption": 40.0}, first) and is_lost({"caption": 9.0, "balancing": 1e9}, first)


def test_packs_count_by_their_targets():
    sums = torch.tensor([[[3.0, 1.0], [3.0, 1.0]], [[2.0, 4.0], [1.0, 2.0]]], dtype=torch.float64)  # [packs, 2, terms]
    parts = loss_by_pack(sums, torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert parts[0] == pytest.approx((2 * 5 / 4 - 2 / 1, 2 * 5 / 4 - 3 / 3))
    assert parts[1] == pytest.approx((0.5 * (2 * 5 / 3 - 4 / 2), 0.5 * (2 * 5 / 3 - 1 / 1)))


def test_a_term_in_one_pack_has_no_noise_to_compare():
    sums = torch.tensor([[[3.0, 0.0], [3.0, 0.0]], [[0.0, 4.0], [0.0, 2.0]]], dtype=torch.float64)
    parts = loss_by_pack(sums, torch.ones(2, dtype=torch.float64))
    assert parts == ((1.0,), (2.0,))
    rates = [Outcome(rate, False, 10, loss, loss, parts=((loss,),)) for rate, loss in ((1e-3, 4.0), (2e-3, 2.0))]
    choice = choose(rates)
    assert choice.chosen.rate == 2e-3 and math.isnan(choice.noise)
    assert "raise run.evaluate_packs" in advice(choice, 60, 420)[1]


def test_the_batch_of_several_ranks(tiny):
    recipe, deepspeed = load_recipe(tiny.recipe), load_deepspeed(tiny.deepspeed(2))
    assert of_world(deepspeed, recipe, 4)["gradient_accumulation_steps"] == 4
    whole = {**deepspeed, "train_batch_size": 8}
    found = of_world(whole, recipe, 2)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (1, 8)
    assert "train_batch_size" not in found
