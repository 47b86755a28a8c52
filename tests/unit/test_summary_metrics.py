"""Key frames and rank correlations against plain loops and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from dsmoe_vl.metrics.importance import kendall_tau_b, key_frame_f, spearman_rho

METRICS = [key_frame_f, kendall_tau_b, spearman_rho]


def draw(seed):
    """Scores of 1 to 60 frames with 2 to 12 levels, so most of them tie."""
    rng = np.random.default_rng(seed)
    frames = int(rng.integers(1, 61))
    predicted, truth = (rng.integers(0, rng.integers(2, 13), frames) / 8 for _ in range(2))
    return predicted, truth + predicted * rng.integers(-1, 2)


def key_frame_oracle(predicted, truth, fraction):
    k = 1
    while k < fraction * len(truth) - 1e-9:
        k += 1
    left, chosen = list(range(len(truth))), []
    for _ in range(k):
        best = left[0]
        for frame in left:
            if predicted[frame] > predicted[best]:
                best = frame
        chosen.append(best)
        left.remove(best)
    threshold = sorted(truth, reverse=True)[k - 1]
    hits = sum(truth[frame] >= threshold for frame in chosen)
    precision = recall = hits / k
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def tau_oracle(predicted, truth):
    agree = differ = tied_predicted = tied_truth = pairs = 0
    for i in range(len(truth)):
        for j in range(i):
            pairs += 1
            tied_predicted += predicted[i] == predicted[j]
            tied_truth += truth[i] == truth[j]
            product = (predicted[i] - predicted[j]) * (truth[i] - truth[j])
            agree += product > 0
            differ += product < 0
    scale = math.sqrt((pairs - tied_predicted) * (pairs - tied_truth))
    return (agree - differ) / scale if scale else 0.0


def rho_oracle(predicted, truth):
    def ranks(scores):
        return [sum(s < mine for s in scores) + (1 + sum(s == mine for s in scores)) / 2 for mine in scores]

    a, b, middle = ranks(predicted), ranks(truth), (len(truth) + 1) / 2
    covariance = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    scale = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return covariance / scale if scale else 0.0


@pytest.mark.parametrize("seed", range(30))
def test_equals_plain_loops(seed):
    predicted, truth = draw(seed)
    for fraction in (0.07, 0.15, 0.5, 1.0):
        found = key_frame_f(predicted, truth, fraction)
        assert found == pytest.approx(key_frame_oracle(predicted, truth, fraction), abs=1e-12)
    assert kendall_tau_b(predicted, truth) == pytest.approx(tau_oracle(predicted, truth), abs=1e-12)
    assert spearman_rho(predicted, truth) == pytest.approx(rho_oracle(predicted, truth), abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_correlations_equal_scipy(seed):
    predicted, truth = draw(seed)
    if len(set(predicted)) > 1 and len(set(truth)) > 1:
        assert kendall_tau_b(predicted, truth) == pytest.approx(stats.kendalltau(predicted, truth).statistic, abs=1e-12)
        assert spearman_rho(predicted, truth) == pytest.approx(stats.spearmanr(predicted, truth).statistic, abs=1e-12)


def test_key_frames_by_hand():
    truth = np.array([0.1, 0.9, 0.5, 0.5, 0.2, 0.5, 0.0, 0.3, 0.3, 0.3])
    # Two of ten frames: frame 1, and 2, 3 or 5, which tie.
    for predicted, expected in [([1, 5], 1.0), ([3, 2], 1.0), ([1, 4], 0.5), ([0, 9], 0.0)]:
        scores = np.zeros(10)
        scores[predicted] = 1
        assert key_frame_f(scores, truth) == expected
    assert key_frame_f(np.ones(10), truth) == 0.5  # frames 0 and 1


@pytest.mark.parametrize(("frames", "fraction", "k"), [(1, 0.15, 1), (20, 0.15, 3), (21, 0.15, 4), (100, 0.07, 7)])
def test_the_number_of_key_frames_is_rounded_up(frames, fraction, k):
    truth, predicted = np.zeros(frames), np.zeros(frames)
    truth[:k] = 1 + np.arange(k)
    predicted[0], predicted[k : 2 * k] = 1, 0.5
    # Frame 0 is the only hit: with k - 1 frames it is not among the right ones, with k + 1 all frames are right.
    assert key_frame_f(predicted, truth, fraction) == pytest.approx(1 / k)


def test_a_truth_without_enough_levels_makes_every_choice_right():
    one_of_twenty = np.arange(20) == 3
    assert key_frame_f(np.arange(20), one_of_twenty) == 1.0
    assert key_frame_f(np.arange(20), np.zeros(20)) == 1.0


def test_correlations_by_hand():
    up = np.arange(5)
    for metric in (kendall_tau_b, spearman_rho):
        assert metric(up, up * 3.5 - 1) == 1.0
        assert metric(up, -up) == -1.0
    # Pairs: 01 tie in predicted; 02, 12 agree; of 2 x 3 untied pairs.
    assert kendall_tau_b(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(2 / math.sqrt(6))
    # Ranks 1.5 1.5 3 and 1 2 3, centred -.5 -.5 1 and -1 0 1: 1.5 / sqrt(1.5 x 2).
    assert spearman_rho(np.array([1, 1, 2]), np.array([1, 2, 3])) == pytest.approx(1.5 / math.sqrt(3))


@pytest.mark.parametrize("metric", [kendall_tau_b, spearman_rho])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_a_constant_side_does_not_correlate(metric, frames):
    constant, other = np.full(frames, 0.1), np.arange(frames)
    assert metric(constant, other) == metric(other, constant) == metric(constant, constant) == 0.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([1.0, 2.0], [1.0], "same shape"),
        ([], [], "same shape"),
        ([[1.0]], [[1.0]], "same shape"),
        ([1.0, math.nan], [1.0, 2.0], "finite"),
        ([1.0, 2.0], [1.0, math.inf], "finite"),
    ],
)
def test_refuses_what_is_not_scores_of_one_video(metric, predicted, truth, message):
    with pytest.raises(ValueError, match=message):
        metric(np.array(predicted), np.array(truth))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_refuses_a_fraction_outside_0_to_1(fraction):
    with pytest.raises(ValueError, match="fraction must be"):
        key_frame_f(np.arange(3), np.arange(3), fraction)
