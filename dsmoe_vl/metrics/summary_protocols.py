"""How TVSum, SumMe and VideoXum are scored: a prediction against the summaries of all who annotated a video.

Shapes: U users (annotators), P equal parts of a video, for which KEY.json has their scores; what a part is worth in
frames is `lengths`, int64 [P]. Predictions are float [P], users' scores float [U, P], both in 0 to 1. Borders are those
of shots, counted in parts (`shots.py`).

Overlaps depend on the shots more than on the scores, and random scores come near the state of the art (Otani et al.
2019), so the correlations with every user stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsmoe_vl.metrics.importance import kendall_tau_b, spearman_rho
from dsmoe_vl.metrics.shots import SHARE, key_shots

_TVSUM_STEP = 15  # frames from one score to the next: see data_tools/formats/tvsum.py


def tvsum_f(predicted: np.ndarray, users: np.ndarray, borders: np.ndarray, lengths: np.ndarray) -> float:
    """The mean over users of F between the predicted key shots and those of the user's scores.

    Both come from the same shots by the same knapsack (Song et al. 2015; Zhang et al. 2016). The users' scores count
    as 1 to 5, as they were given: with 0 for the lowest, a shot of the lowest score would never fill what is left.
    """
    chosen = key_shots(predicted, borders, lengths)
    return float(np.mean([overlap_f(chosen, key_shots(1 + 4 * user, borders, lengths), lengths) for user in users]))


def summe_f(predicted: np.ndarray, users: np.ndarray, borders: np.ndarray, lengths: np.ndarray) -> float:
    """The largest F, over users, between the predicted key shots and the summary that the user cut (Gygli et al. 2014;
    the maximum: Gygli et al. 2015, Zhang et al. 2016). A user's summary has any length and follows no shots.
    """
    chosen = key_shots(predicted, borders, lengths)
    return max(overlap_f(chosen, user > 0.5, lengths) for user in users)


def videoxum_f(predicted: np.ndarray, users: np.ndarray) -> float:
    """The mean over users of F between the most important 15 % of the frames and those that the user chose, without
    shots (Lin et al. 2023).

    As many frames as the authors' program takes of scores that all differ: floor(0.15 P) + 1. Of equal scores it takes
    all, so that a constant prediction is the whole video; here the earlier ones come first.
    """
    count = min(len(predicted), int(SHARE * len(predicted) + 1e-9) + 1)
    chosen = np.zeros(len(predicted), dtype=bool)
    chosen[np.argsort(-predicted, kind="stable")[:count]] = True
    frames = np.ones(len(predicted), dtype=np.int64)
    return float(np.mean([overlap_f(chosen, user > 0.5, frames) for user in users]))


def user_correlations(predicted: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Kendall's tau-b and Spearman's rho between the prediction and every user's scores, their means (Otani et al.
    2019): `user_kendall_tau`, `user_spearman_rho`. A user whose scores are all the same counts as 0.

    On TVSum, whose converted scores are those of every 15th frame, one user and the others agree by 0.177 and 0.204.
    """
    metrics = {"user_kendall_tau": kendall_tau_b, "user_spearman_rho": spearman_rho}
    return {name: float(np.mean([metric(predicted, user) for user in users])) for name, metric in metrics.items()}


def overlap_f(chosen: np.ndarray, reference: np.ndarray, lengths: np.ndarray) -> float:
    """The harmonic mean of precision and recall, in frames: bool [P] each. 0 where they have nothing in common."""
    shared = int(lengths[chosen & reference].sum())
    return 2 * shared / int(lengths[chosen].sum() + lengths[reference].sum()) if shared else 0.0


def frames_of_parts(source: str, parts: int, annotated_frames: object) -> np.ndarray:
    """Frames of each part, int64 [P], as the converter of `source` cut the video; 1 each where it is not known.

    TVSum's are those from one kept score to the next, the last may be shorter; SumMe's are equal but for rounding.
    """
    if not isinstance(annotated_frames, int) or annotated_frames < parts:
        return np.ones(parts, dtype=np.int64)
    if source == "tvsum" and -(-annotated_frames // _TVSUM_STEP) == parts:
        return np.diff(np.minimum(np.arange(parts + 1) * _TVSUM_STEP, annotated_frames))
    return np.diff(np.arange(parts + 1) * annotated_frames // parts)


def times_of_parts(source: str, lengths: np.ndarray, duration: float, frames_a_second: object) -> np.ndarray:
    """The mean time of the frames for which the annotation of each part holds: seconds, float64 [P].

    The middle of a part of many frames, or of unknown ones; the beginning of one that is a single frame. TVSum's scores
    are those of the frame with which a part begins.
    """
    seconds = lengths * (duration / lengths.sum())
    if source == "tvsum":
        return np.cumsum(seconds) - seconds
    is_known = isinstance(frames_a_second, int | float) and 0 < frames_a_second < float("inf")
    frames = np.maximum(seconds * frames_a_second, 1) if is_known else np.inf
    return np.cumsum(seconds) - seconds + seconds * (1 - 1 / frames) / 2


def needs_shots(source: str) -> bool:
    """Whether the protocol of KEY.json's `source` chooses whole shots."""
    return source in ("tvsum", "summe")


def protocol_scores(
    source: str, predicted: np.ndarray, users: np.ndarray, lengths: np.ndarray, find_borders: Callable[[], np.ndarray]
) -> dict[str, float]:
    """The overlap of the protocol of KEY.json's `source`, `tvsum_f`, `summe_f` or `videoxum_f`, none for any other;
    and `user_correlations`. `find_borders` is called where shots are needed: it may cost more than the prediction did.
    """
    scores = user_correlations(predicted, users)
    if needs_shots(source):
        overlap = tvsum_f if source == "tvsum" else summe_f
        scores[f"{source}_f"] = overlap(predicted, users, find_borders(), lengths)
    elif source == "videoxum":
        scores["videoxum_f"] = videoxum_f(predicted, users)
    return scores
