"""Agreement of predicted frame scores with one annotator's, for one video: key-frame overlap and rank correlations.

Random scores are near the state of the art in overlap (Otani et al. 2019), so it is reported with both correlations.
Every function takes two arrays [F] of finite scores, higher is more important, and raises ValueError otherwise.
"""

from __future__ import annotations

import math

import numpy as np


def key_frame_f(predicted: np.ndarray, truth: np.ndarray, fraction: float = 0.15) -> float:
    """F score between the k = ceil(fraction * F) most important frames of both, 0 to 1.

    Among equal predictions the earlier frame is chosen. A frame is correct if its truth is at least the k-th largest.
    If that is also the smallest (a constant truth, or 0 and 1 with fewer than k ones), any choice scores 1. Precision
    and recall are both hits / k, so F is too.
    """
    predicted, truth = _checked(predicted, truth)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
    k = math.ceil(round(fraction * len(truth), 9))  # 0.07 * 100 is a little more than 7
    chosen = np.argsort(-predicted, kind="stable")[:k]
    right = truth >= np.sort(truth)[-k]
    return float(np.count_nonzero(right[chosen]) / k)


def kendall_tau_b(predicted: np.ndarray, truth: np.ndarray) -> float:
    """`(concordant - discordant) / sqrt(pairs untied in predicted * pairs untied in truth)` (Kendall 1945), -1 to 1.

    0.0 if one side is constant. O(F) memory, O(F^2) time.
    """
    predicted, truth = _checked(predicted, truth)
    concordance, untied_predicted, untied_truth = 0, 0, 0
    for frame in range(1, len(truth)):
        a = np.sign(predicted[frame] - predicted[:frame])
        b = np.sign(truth[frame] - truth[:frame])
        concordance += int(a @ b)
        untied_predicted += int(np.count_nonzero(a))
        untied_truth += int(np.count_nonzero(b))
    untied = untied_predicted * untied_truth
    return concordance / math.sqrt(untied) if untied else 0.0


def spearman_rho(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Pearson correlation of the ranks; equal scores get their average rank (Spearman 1904), -1 to 1.

    0.0 if one side is constant.
    """
    predicted, truth = _checked(predicted, truth)
    a, b = _centred_ranks(predicted), _centred_ranks(truth)
    variance = float(a @ a) * float(b @ b)
    return float(a @ b) / math.sqrt(variance) if variance else 0.0


def _centred_ranks(scores: np.ndarray) -> np.ndarray:
    """Average ranks minus their mean: multiples of 0.5, so constant scores give exact zeros."""
    _, level, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[level] - (len(scores) + 1) / 2


def _checked(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if predicted.ndim != 1 or predicted.shape != truth.shape or predicted.size == 0:
        raise ValueError(f"scores of one video must have the same shape [F], not {predicted.shape} and {truth.shape}")
    if not (np.isfinite(predicted).all() and np.isfinite(truth).all()):
        raise ValueError("scores must be finite")
    return predicted.astype(np.float64), truth.astype(np.float64)
