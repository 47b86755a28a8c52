"""Shots and key shots against every possibility, and by hand."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from dsmoe_vl.metrics import shots
from dsmoe_vl.metrics.shots import key_shots, knapsack, segment, unit_features


def scatter(features):
    mean = features.mean(axis=0)
    return sum(float(((frame - mean) ** 2).sum()) for frame in features)


def segment_oracle(features, variance, max_shots):
    """The cheapest of all segmentations."""
    frames = len(features)
    best = (np.inf, ())
    for changes in range(max_shots):
        penalty = variance / 2 * changes * (np.log(frames / changes) + 1) if changes else 0.0
        for inner in combinations(range(1, frames), changes):
            borders = (0, *inner, frames)
            cost = penalty + sum(scatter(features[a:b]) for a, b in pairwise(borders))
            if cost < best[0] - 1e-9:
                best = (cost, borders)
    return list(best[1])


@pytest.mark.parametrize("seed", range(20))
def test_segmentation_is_the_cheapest_of_all(seed):
    rng = np.random.default_rng(seed)
    frames = int(rng.integers(1, 11))
    features = rng.normal(size=(frames, 3)) + 3 * rng.normal(size=(3, 3))[np.sort(rng.integers(0, 3, frames))]
    for variance in (0.5, 1.0, 4.0, 20.0):
        for most in {1, min(3, frames), frames}:
            assert segment(features, variance, most).tolist() == segment_oracle(features, variance, most)


def test_segmentation_by_hand():
    """Two values: with a change L is 0 and the penalty log(6) + 1 halves; without one L is 6 x 0.25 d^2."""
    for distance, borders in [(1.0, [0, 3, 6]), (0.9, [0, 6])]:
        features = distance * np.array([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]])
        assert (6 * 0.25 * distance**2 > (np.log(6) + 1) / 2) == (len(borders) == 3)
        assert segment(features).tolist() == borders


def test_changes_are_found_where_they_are():
    rng = np.random.default_rng(0)
    lengths = [40, 7, 90, 23, 60]
    scenes = np.repeat(np.arange(5), lengths)
    features = rng.normal(size=(5, 64))[scenes] + 0.1 * rng.normal(size=(220, 64)) + 7
    for shift in (0.0, 1e4):  # a large mean must cost no digits
        assert segment(unit_features(features + shift)).tolist() == [0, *np.cumsum(lengths).tolist()]


def test_a_still_video_is_one_shot():
    for features in (np.ones((30, 8)), np.ones((30, 8)) * np.float32(0.1), np.zeros((30, 8))):
        assert segment(unit_features(features)).tolist() == [0, 30]
    noise = 1e-7 * np.random.default_rng(0).normal(size=(30, 8))
    assert segment(unit_features(np.ones((30, 8)) + noise)).tolist() == [0, 30]


def test_noise_is_not_cut_into_single_frames():
    features = np.random.default_rng(0).normal(size=(41, 200))
    assert len(segment(unit_features(features))) - 1 <= 11


def test_segmentation_refuses_what_it_cannot_hold(monkeypatch):
    monkeypatch.setattr(shots, "MAX_FRAMES", 10)
    with pytest.raises(ValueError, match="21 frames: take every 3th"):
        segment(np.zeros((21, 2)))
    for features in (np.zeros((0, 2)), np.zeros(3), np.array([[np.nan]])):
        with pytest.raises(ValueError, match="finite numbers"):
            segment(features)
    for most in (0, 4):
        with pytest.raises(ValueError, match="max_shots must be from 1 to 3"):
            segment(np.zeros((3, 1)), max_shots=most)


def knapsack_oracle(values, weights, capacity):
    """The largest total of all selections."""
    totals = [
        sum(values[i] for i in chosen)
        for count in range(len(values) + 1)
        for chosen in combinations(range(len(values)), count)
        if sum(weights[i] for i in chosen) <= capacity
    ]
    return max(totals)


@pytest.mark.parametrize("seed", range(40))
def test_the_knapsack_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 11))
    values, weights = rng.integers(0, 20, count), rng.integers(1, 12, count)
    for capacity in (0, 5, int(weights.sum() // 2), int(weights.sum())):
        chosen = knapsack(values, weights, capacity)
        assert weights[chosen].sum() <= capacity
        assert values[chosen].sum() == knapsack_oracle(values.tolist(), weights.tolist(), capacity)


def test_knapsack_by_hand():
    # The most valuable thing alone is worth 10; the other two fit together and are worth 11.
    assert knapsack(np.array([10, 6, 5]), np.array([5, 3, 2]), 5).tolist() == [False, True, True]
    # Equal totals leave the later one out, and what is worth nothing is never taken.
    assert knapsack(np.array([3, 3, 0]), np.array([2, 2, 1]), 3).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("values", "weights", "capacity", "message"),
    [([0.5], [1], 1, "whole numbers"), ([1], [1, 2], 1, "whole"), ([-1], [1], 1, "at least"), ([1], [0], 1, "least")],
)
def test_the_knapsack_refuses_other_numbers(values, weights, capacity, message):
    with pytest.raises(ValueError, match=message):
        knapsack(np.array(values), np.array(weights), capacity)


def test_key_shots_by_hand():
    """Of 20 parts of 5 frames 15 % are 15 frames. Shot means .2, .9, .5, .6 at 40, 20, 10 and 30 frames: only the third
    fits; cut in the middle, the second's halves of 10 frames have the higher mean."""
    scores = np.repeat([0.2, 0.9, 0.5, 0.6], [8, 4, 2, 6])
    lengths = np.full(20, 5)
    assert np.flatnonzero(key_shots(scores, np.array([0, 8, 12, 14, 20]), lengths)).tolist() == [12, 13]
    assert np.flatnonzero(key_shots(scores, np.array([0, 8, 10, 12, 14, 20]), lengths)).tolist() == [8, 9]
    assert key_shots(scores, np.array([0, 8, 12, 14, 20]), lengths, share=1.0).all()


def test_a_shots_mean_is_that_of_its_frames():
    """A part of one frame counts a tenth of one of ten: means (10 x .4 + 1) / 11 and .45; 15 % of 110 are 16 frames."""
    scores, lengths = np.array([0.4, 1.0, 0.45, 0.45, 0.0]), np.array([10, 1, 5, 6, 88])
    chosen = key_shots(scores, np.array([0, 2, 4, 5]), lengths)
    assert chosen.tolist() == [True, True, False, False, False]
    scores[2:4] = 0.46
    assert key_shots(scores, np.array([0, 2, 4, 5]), lengths).tolist() == [False, False, True, True, False]
