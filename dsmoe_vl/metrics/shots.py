"""Shots and key shots of a video: kernel temporal segmentation and the 0/1 knapsack, in numpy.

Shapes: F frames, D features per frame, S shots. Borders are int64 [S + 1] from 0 to F: shot s is frames borders[s] up
to, but not including, borders[s + 1].
"""

from __future__ import annotations

import numpy as np

# 17 minutes of video at two frames per second. Several float64 matrices [F + 1, F + 1] exist at once, 34 MB each.
MAX_FRAMES = 2048
SHARE = 0.15  # of the video's length, the most a summary may have (Song et al. 2015; Gygli et al. 2014)
_FRAMES_A_SHOT = 4  # minimum on average: two seconds at two frames per second
_SCALE = 10**6  # shot values are rounded to integers, so that equal shots tie


def unit_features(features: np.ndarray) -> np.ndarray:
    """Features [F, D] minus the video's mean, then normalised to length 1: float64 [F, D].

    The penalty of `segment` assumes a kernel of at most 1. Without subtracting the mean, all features of an encoder are
    nearly equal, and no video would have a second shot. A frame equal to the mean stays 0.
    """
    features = _checked(features)
    centred = features - features.mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    noise = 1e-5 * np.linalg.norm(features, axis=1).max()  # differences below this are float32 rounding
    return np.where(lengths > noise, centred / np.maximum(lengths, np.finfo(np.float64).tiny), 0.0)


def segment(features: np.ndarray, variance: float = 1.0, max_shots: int | None = None) -> np.ndarray:
    """Kernel temporal segmentation with a linear kernel (Potapov et al. 2014): borders int64 [S + 1].

    The m changes t_1 < ... < t_m minimise `L + variance / 2 * m * (log(F / m) + 1)` over all m and t, where L is the
    sum over all frames of the squared distance to the mean of their shot. `variance` is the largest variance of a frame
    within its shot; 1 for features of length 1, as in the authors' program. In a tie the fewest shots are chosen.

    Args:
        features: [F, D], F at most MAX_FRAMES.
        max_shots: by default F / 4, rounded up; otherwise noise would be split into single frames.

    Time is O(F^2 (D + max_shots)), memory O(F^2). Raises ValueError for too many or no frames, or non-finite features.
    """
    features = _checked(features)
    frames = len(features)
    if frames > MAX_FRAMES:
        raise ValueError(
            f"{frames} frames: take every {-(-frames // MAX_FRAMES)}th, at most {MAX_FRAMES} are segmented"
        )
    shots = -(-frames // _FRAMES_A_SHOT) if max_shots is None else max_shots
    if not 1 <= shots <= frames:
        raise ValueError(f"max_shots must be from 1 to {frames} frames, not {shots}")
    scatter = _scatter(features)
    cost = scatter[:, 0]  # [F + 1]: cost of the frames before j, with the shots so far
    totals = [cost[frames]]
    last_borders: list[np.ndarray] = []
    candidates = np.empty_like(scatter)  # row j: candidate starts of the last shot before j
    for changes in range(1, shots):
        np.add(scatter, cost, out=candidates)
        border = candidates.argmin(axis=1)
        cost = candidates[np.arange(frames + 1), border]
        last_borders.append(border.astype(np.int16))
        totals.append(cost[frames] + variance / 2 * changes * (np.log(frames / changes) + 1))
    borders = [frames]
    for changes in range(int(np.argmin(totals)), 0, -1):
        borders.append(int(last_borders[changes - 1][borders[-1]]))
    return np.array([0, *borders[::-1]])


def knapsack(values: np.ndarray, weights: np.ndarray, capacity: int) -> np.ndarray:
    """Which items have the largest total value with a total weight of at most `capacity`: bool [S].

    Exact, by dynamic programming over integers: values int64 [S] at least 0, weights int64 [S] at least 1; O(S
    capacity) time and memory. Among equal totals, later items are left out first; items of value 0 are never chosen.
    Raises ValueError for other numbers.
    """
    integers = all(np.issubdtype(array.dtype, np.integer) for array in (values, weights))
    if not integers or values.shape != weights.shape or values.ndim != 1:
        raise ValueError(f"values and weights must be whole numbers [S], not {values.dtype} and {weights.dtype}")
    if np.any(values < 0) or np.any(weights < 1) or capacity < 0:
        raise ValueError("values must be at least 0, weights at least 1, the capacity at least 0")
    best = np.zeros(capacity + 1, dtype=np.int64)  # with the items so far, for every capacity
    taken = np.zeros((len(values), capacity + 1), dtype=bool)
    for item, (value, weight) in enumerate(zip(values.tolist(), weights.tolist(), strict=True)):
        if weight <= capacity:
            with_it = best[: capacity + 1 - weight] + value
            taken[item, weight:] = with_it > best[weight:]
            best[weight:] = np.maximum(best[weight:], with_it)
    chosen = np.zeros(len(values), dtype=bool)
    for item in reversed(range(len(values))):
        if taken[item, capacity]:
            chosen[item] = True
            capacity -= int(weights[item])
    return chosen


def key_shots(scores: np.ndarray, borders: np.ndarray, lengths: np.ndarray, share: float = SHARE) -> np.ndarray:
    """The parts of a video in its summary of at most `share` of its length: bool [P] for P parts.

    A shot's value is the mean score of its frames, and its weight their number (Song et al. 2015; Zhang et al. 2016):
    the mean, not the sum, so short shots are favoured (Otani et al. 2019). The capacity is rounded down.

    Args:
        scores: [P], finite and not negative.
        borders: of shots, counted in parts.
        lengths: frames of each part, int64 [P].
    """
    weights = np.add.reduceat(lengths, borders[:-1])
    means = np.add.reduceat(scores * lengths, borders[:-1]) / weights
    capacity = int(lengths.sum() * share + 1e-9)  # 0.15 * 100 may be a little less than 15
    chosen = knapsack(np.rint(means * _SCALE).astype(np.int64), weights, capacity)
    return np.repeat(chosen, np.diff(borders))


def _scatter(features: np.ndarray) -> np.ndarray:
    """At [j, i] the sum of squared distances of frames i to j - 1 from their mean: [F + 1, F + 1], inf for j <= i."""
    features = features - features.mean(axis=0)  # same result, but smaller sums lose fewer digits
    frames = len(features)
    sums = np.zeros((frames + 1, frames + 1))
    sums[1:, 1:] = features @ features.T
    squares = np.concatenate(([0.0], np.cumsum(np.diagonal(sums)[1:])))
    np.cumsum(sums, axis=0, out=sums)
    np.cumsum(sums, axis=1, out=sums)
    corners = np.diagonal(sums)
    block = corners[None, :] + corners[:, None]  # the kernel summed over frames i to j, twice
    block -= sums
    block -= sums.T
    count = np.arange(frames + 1)[:, None] - np.arange(frames + 1)[None, :]
    inside = count > 0
    block /= np.where(inside, count, 1)
    scatter = squares[:, None] - squares[None, :] - block
    return np.where(inside, np.maximum(scatter, 0.0), np.inf)


def _checked(features: np.ndarray) -> np.ndarray:
    if features.ndim != 2 or features.size == 0 or not np.isfinite(features).all():
        raise ValueError(f"features must be finite numbers [frames, width], not of shape {list(features.shape)}")
    return features.astype(np.float64)
