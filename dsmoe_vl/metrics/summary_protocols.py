"""Scoring protocols of TVSum, SumMe and VideoXum: a prediction against the summaries of all annotators of a video.

Shapes: U users (annotators), P equal parts of a video, which KEY.json has scores for; `lengths`, int64 [P], is the
number of frames of each part. Predictions are float [P], users' scores float [U, P], both in 0 to 1. Borders are shot
borders, counted in parts (`shots.py`).

Overlaps depend more on the shots than on the scores, and random scores are near the state of the art (Otani et al.
2019), so the correlations with every user are reported too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from dsmoe_vl.metrics.importance import kendall_tau_b, spearman_rho
from dsmoe_vl.metrics.shots import SHARE, key_shots

_TVSUM_STEP = 15  # frames from one score to the next: see data_tools/formats/tvsum.py


def tvsum_f(predicted: np.ndarray, users: np.ndarray, borders: np.ndarray, lengths: np.ndarray) -> float:
    """The mean over users of F between the key shots of the prediction and of the user's scores.

    Both use the same shots and the same knapsack (Song et al. 2015; Zhang et al. 2016). The users' scores are scaled
    back to the original 1 to 5: with 0 as the lowest, a shot of the lowest score would never fill remaining capacity.
    """
    chosen = key_shots(predicted, borders, lengths)
    return float(np.mean([overlap_f(chosen, key_shots(1 + 4 * user, borders, lengths), lengths) for user in users]))


def summe_f(predicted: np.ndarray, users: np.ndarray, borders: np.ndarray, lengths: np.ndarray) -> float:
    """The largest F, over users, between the predicted key shots and the summary that the user cut (Gygli et al. 2014;
    the maximum: Gygli et al. 2015, Zhang et al. 2016). A user's summary may have any length and ignore shots.
    """
    chosen = key_shots(predicted, borders, lengths)
    return max(overlap_f(chosen, user > 0.5, lengths) for user in users)


def videoxum_f(predicted: np.ndarray, users: np.ndarray) -> float:
    """The mean over users of F between the most important 15 % of the frames and those that the user chose, without
    shots (Lin et al. 2023).

    The number of frames is floor(0.15 P) + 1, as in the authors' program if all scores differ. Of equal scores that
    program takes all, so a constant prediction is the whole video; here earlier frames come first.
    """
    count = min(len(predicted), int(SHARE * len(predicted) + 1e-9) + 1)
    chosen = np.zeros(len(predicted), dtype=bool)
    chosen[np.argsort(-predicted, kind="stable")[:count]] = True
    frames = np.ones(len(predicted), dtype=np.int64)
    return float(np.mean([overlap_f(chosen, user > 0.5, frames) for user in users]))


def user_correlations(predicted: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Means over users of Kendall's tau-b and Spearman's rho between the prediction and the user's scores (Otani et al.
    2019): `user_kendall_tau`, `user_spearman_rho`. A user with constant scores counts as 0.

    On TVSum, converted at every 15th frame, one user and the others agree by 0.177 and 0.204.
    """
    metrics = {"user_kendall_tau": kendall_tau_b, "user_spearman_rho": spearman_rho}
    return {name: float(np.mean([metric(predicted, user) for user in users])) for name, metric in metrics.items()}


def overlap_f(chosen: np.ndarray, reference: np.ndarray, lengths: np.ndarray) -> float:
    """The harmonic mean of precision and recall, in frames: bool [P] each. 0 if they share no frame."""
    shared = int(lengths[chosen & reference].sum())
    return 2 * shared / int(lengths[chosen].sum() + lengths[reference].sum()) if shared else 0.0


def frames_of_parts(source: str, parts: int, annotated_frames: object) -> np.ndarray:
    """Number of frames of each part, int64 [P], as in the converter of `source`; 1 each if unknown.

    TVSum: frames from one kept score to the next, the last part may be shorter. SumMe: equal up to rounding.
    """
    if not isinstance(annotated_frames, int) or not parts <= annotated_frames < 2**31:
        return np.ones(parts, dtype=np.int64)
    if source == "tvsum" and -(-annotated_frames // _TVSUM_STEP) == parts:
        return np.diff(np.minimum(np.arange(parts + 1) * _TVSUM_STEP, annotated_frames))
    return np.diff(np.arange(parts + 1) * annotated_frames // parts)


def times_of_parts(source: str, lengths: np.ndarray, duration: float, frames_a_second: object) -> np.ndarray:
    """The mean time of the frames that each part's annotation is about: seconds, float64 [P].

    The middle of a part with many frames, or an unknown number; the beginning of a part with one frame. TVSum scores
    the first frame of a part.
    """
    seconds = lengths * (duration / lengths.sum())
    if source == "tvsum":
        return np.cumsum(seconds) - seconds
    is_known = isinstance(frames_a_second, int | float) and 0 < frames_a_second <= sys.float_info.max
    frames = np.maximum(seconds * frames_a_second, 1) if is_known else np.inf
    return np.cumsum(seconds) - seconds + seconds * (1 - 1 / frames) / 2


def needs_shots(source: str) -> bool:
    """Whether the protocol of KEY.json's `source` selects whole shots."""
    return source in ("tvsum", "summe")


def protocol_scores(
    source: str, predicted: np.ndarray, users: np.ndarray, lengths: np.ndarray, find_borders: Callable[[], np.ndarray]
) -> dict[str, float]:
    """The overlap of the protocol of KEY.json's `source`, `tvsum_f`, `summe_f` or `videoxum_f`, none for any other;
    and `user_correlations`. `find_borders` is called only if shots are needed: it may cost more than the prediction.
    """
    scores = user_correlations(predicted, users)
    if needs_shots(source):
        overlap = tvsum_f if source == "tvsum" else summe_f
        scores[f"{source}_f"] = overlap(predicted, users, find_borders(), lengths)
    elif source == "videoxum":
        scores["videoxum_f"] = videoxum_f(predicted, users)
    return scores
