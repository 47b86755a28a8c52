"""The protocols of TVSum, SumMe and VideoXum: by hand, and on the summaries of 20 real users."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation import summaries
from dsmoe_vl.inference.summarize import VideoSummary
from dsmoe_vl.metrics.shots import key_shots
from dsmoe_vl.metrics.summary_protocols import (
    frames_of_parts,
    overlap_f,
    summe_f,
    times_of_parts,
    tvsum_f,
    user_correlations,
    videoxum_f,
)
from dsmoe_vl.tasks.video_summary import importance_at
from tests.support.samples import sample

ONES = np.ones(20, dtype=np.int64)
# Twenty parts in four shots; 15 % are three of them.
BORDERS = np.array([0, 3, 6, 9, 20])


def shot_scores(*scores):
    return np.repeat(np.array(scores, dtype=np.float64), np.diff(BORDERS))


def test_overlap_by_hand():
    chosen, reference = np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 1], bool)
    assert overlap_f(chosen, reference, np.array([1, 1, 1, 1])) == pytest.approx(
        2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    )
    # In frames: precision 30 / 40, recall 30 / 50.
    assert overlap_f(chosen, reference, np.array([10, 30, 15, 5])) == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert overlap_f(chosen, ~chosen, np.ones(4)) == overlap_f(chosen, chosen & False, np.ones(4)) == 0.0
    assert overlap_f(chosen & False, chosen & False, np.ones(4)) == 0.0


def test_tvsum_by_hand():
    """The prediction is the first shot; of three users one chose it, one another, one gave everything the same score,
    of which the knapsack takes the first."""
    users = np.stack([shot_scores(1, 0.5, 0, 0), shot_scores(0, 1, 0.5, 0.75), shot_scores(0.5, 0.5, 0.5, 0.5)])
    assert tvsum_f(shot_scores(0.9, 0.3, 0.2, 0.1), users, BORDERS, ONES) == pytest.approx(2 / 3)
    assert tvsum_f(shot_scores(0.1, 0.2, 0.3, 0.9), users, BORDERS, ONES) == 0.0  # the last shot is too long


def test_tvsum_users_keep_their_scale():
    """Shots of 1, 1, 1 and 3 parts with scores 1, 1, 2 and 4 from 1 to 5, for three parts: the three short ones give 4,
    the long one 4 too, and the earlier ones stay. From 0 to 1 the short ones would give 0.25 and the long one 0.75."""
    borders = np.array([0, 1, 2, 3, 6, 20])
    user = (np.repeat([1.0, 1.0, 2.0, 4.0, 1.0], np.diff(borders)) - 1) / 4
    assert tvsum_f(np.repeat([1.0, 1, 1, 0, 0], np.diff(borders)), user[None], borders, ONES) == 1.0
    assert np.flatnonzero(key_shots(user, borders, ONES)).tolist() == [3, 4, 5]


def test_summe_takes_the_user_who_agrees_most():
    """The prediction is parts 0 to 2; users cut parts 2 to 7, 0 to 3, and nothing: F is 2 x 1/9, 6/7 and 0."""
    users = np.zeros((3, 20))
    users[0, 2:8] = users[1, :4] = 1
    assert summe_f(shot_scores(0.9, 0.3, 0.2, 0.1), users, BORDERS, ONES) == pytest.approx(6 / 7)
    assert summe_f(shot_scores(0.9, 0.3, 0.2, 0.1), users[[0, 2]], BORDERS, ONES) == pytest.approx(2 / 9)


def test_videoxum_by_hand():
    """floor(3) + 1 = 4 frames, here the last: the users' have 4 and 1 in common with them, of 4 and 10."""
    users = np.zeros((2, 20))
    users[0, 16:] = users[1, 7:17] = 1
    assert videoxum_f(np.arange(20) / 20, users) == pytest.approx((1 + 2 * 1 / 14) / 2)
    # Equal scores: the first four, of which nobody chose any, not the whole video.
    assert videoxum_f(np.ones(20), users) == 0.0
    assert videoxum_f(np.ones(1), np.ones((1, 1))) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_means_of_scipys(seed):
    rng = np.random.default_rng(seed)
    users, predicted = rng.integers(0, 5, (6, 40)) / 4, rng.random(40)
    found = user_correlations(predicted, users)
    taus = [stats.kendalltau(predicted, user).statistic for user in users]
    rhos = [stats.spearmanr(predicted, user).statistic for user in users]
    assert found == pytest.approx({"user_kendall_tau": np.mean(taus), "user_spearman_rho": np.mean(rhos)}, abs=1e-12)


def test_frames_of_parts():
    assert frames_of_parts("tvsum", 4, 50).tolist() == [15, 15, 15, 5]
    assert frames_of_parts("tvsum", 4, 60).tolist() == [15, 15, 15, 15]
    assert frames_of_parts("summe", 4, 50).tolist() == [12, 13, 12, 13]
    assert frames_of_parts("videoxum", 3, None).tolist() == frames_of_parts("tvsum", 3, "x").tolist() == [1, 1, 1]


def of_source(source, **meta):
    """Twenty parts, three users, of a video that lasts ten seconds."""
    users = np.stack([shot_scores(1, 0, 0, 0), shot_scores(0, 1, 0, 0), shot_scores(0, 0, 1, 0)])
    video = sample("video")
    known = {"source": source, "saliency": users.tolist(), "duration_seconds": 10.0}
    return replace(video, meta={"captions": video.meta["captions"], **known, **meta})


FIRST_SHOT = VideoSummary("", np.arange(20) / 2, shot_scores(0.9, 0.3, 0.2, 0.1))
ALWAYS = {"key_frame_f", "kendall_tau", "spearman_rho", "importance_error"}
OF_USERS = {"user_kendall_tau", "user_spearman_rho"}


@pytest.mark.parametrize(
    ("source", "overlap"),
    [("tvsum", 1 / 3), ("summe", 1.0), ("videoxum", (6 / 7 + 2 / 7 + 0) / 3), ("qvhighlights", None)],
)
def test_the_protocol_follows_the_source(monkeypatch, source, overlap):
    asked = []
    monkeypatch.setattr(summaries, "shot_borders", lambda *given: asked.append(given) or BORDERS)
    scores = summaries.importance_scores(None, of_source(source), FIRST_SHOT)
    own = {f"{source}_f"} if overlap is not None else set()
    assert set(scores) == ALWAYS | OF_USERS | own
    assert not own or scores[f"{source}_f"] == pytest.approx(overlap)
    assert len(asked) == (source in ("tvsum", "summe"))  # shots cost more than they would be worth


def test_one_curve_is_no_annotator():
    """As in the synthetic videos: what a mean annotator would say."""
    scores = summaries.importance_scores(None, of_source("tvsum", saliency=None, importance=[0.5, 1.0]), FIRST_SHOT)
    assert set(scores) == ALWAYS
    with pytest.raises(DataError):
        summaries.importance_scores(None, of_source("tvsum", saliency=None), FIRST_SHOT)


def test_a_tvsum_score_is_read_at_its_own_frame():
    """Parts of 15, 15 and 10 frames: the third begins at 0.75 of the video."""
    video = of_source("other", saliency=None, importance=[0.0, 0.0, 1.0], annotated_frames=40)
    peak = VideoSummary("", np.array([0.0, 7.4, 7.45, 7.55, 7.6, 10.0]), np.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]))
    assert summaries.importance_scores(None, video, peak)["importance_error"] == pytest.approx(1 / 3)
    video.meta["source"] = "tvsum"
    assert summaries.importance_scores(None, video, peak)["importance_error"] == pytest.approx(0.0)


def test_other_annotations_hold_for_all_frames_of_a_part():
    lengths = np.ones(5, dtype=np.int64)
    assert times_of_parts("", lengths, 10.0, None).tolist() == pytest.approx([1, 3, 5, 7, 9])
    assert times_of_parts("", lengths, 10.0, 0.5).tolist() == pytest.approx([0, 2, 4, 6, 8])  # a frame is a part
    assert times_of_parts("", lengths, 10.0, 2.0).tolist() == pytest.approx([0.75, 2.75, 4.75, 6.75, 8.75])
    assert times_of_parts("summe", np.array([3, 1]), 8.0, 0.5).tolist() == pytest.approx([2, 6])
    # A model that knows the annotation, which is a step at each border, agrees with it.
    video = of_source("", saliency=None, importance=[0.1, 0.9, 0.1, 0.2, 0.1], fps=25)
    seconds = (np.arange(250) + 0.5) / 25
    curve = VideoSummary("", seconds, importance_at(video, seconds.tolist()))
    scores = summaries.importance_scores(None, video, curve)
    assert (scores["key_frame_f"], scores["kendall_tau"]) == (1.0, pytest.approx(1.0))


@pytest.fixture(scope="module")
def users(shared_data):
    """The key shots that 20 users' scores of TVSum's EE-bNr36nyA come to: bool [20, 2941]."""
    path = shared_data / "video_summary_labels_dsnet" / "custom_data" / "labels" / "EE-bNr36nyA.json"
    return np.array(json.loads(path.read_text())["user_summary"], dtype=np.float64)


def real_borders(users):
    """Wherever any user's summary begins or ends a shot may."""
    return np.array([0, *(np.flatnonzero(np.diff(users, axis=1).any(axis=0)) + 1).tolist(), users.shape[1]])


def test_real_users_choose_what_the_knapsack_chooses(users):
    """Their summaries were made by the published program: at most 15 %, whole shots, and ours of them are the same."""
    lengths = np.ones(users.shape[1], dtype=np.int64)
    assert users.mean(axis=1).max() <= 0.15
    for user in users:
        assert (key_shots(user, real_borders(users), lengths) == user).all()


def test_real_users_agree_as_people_do(users):
    """Leave one out. Two users' summaries overlap by 0.383 in the mean, counted here by sets; what the others chose
    most agrees better with the one than another user does. Random scores overlap more than users do, because their
    shots' means differ little, and the knapsack then takes the short shots, as it did for the users: what Otani et al.
    (2019) found. Their correlation with the users is none."""
    lengths, borders = np.ones(users.shape[1], dtype=np.int64), real_borders(users)
    chosen = [set(np.flatnonzero(user).tolist()) for user in users]
    rng = np.random.default_rng(0)
    pairs, consensus, chance, taus, chance_taus = [], [], [], [], []
    for left_out in range(len(users)):
        one, others = users[left_out : left_out + 1], np.delete(users, left_out, axis=0)
        for i in set(range(len(users))) - {left_out}:
            pairs.append(2 * len(chosen[i] & chosen[left_out]) / (len(chosen[i]) + len(chosen[left_out])))
        ours = np.mean([overlap_f(users[left_out] > 0, other > 0, lengths) for other in others])
        assert ours == pytest.approx(np.mean(pairs[-19:]))
        for scores, overlaps, correlations in [
            (others.mean(axis=0), consensus, taus),
            (rng.random(len(lengths)), chance, chance_taus),
        ]:
            overlaps.append(summe_f(scores, one, borders, lengths))
            correlations.append(user_correlations(scores[::15], one[:, ::15])["user_kendall_tau"])
    assert np.mean(pairs) == pytest.approx(0.383, abs=5e-4)
    assert np.mean(consensus) > np.mean(pairs) and np.mean(chance) > np.mean(pairs)
    assert np.mean(taus) > 0.2 and abs(np.mean(chance_taus)) < 0.05
