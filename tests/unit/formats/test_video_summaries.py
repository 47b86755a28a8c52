"""Readers of video summaries and highlights: tiny copies of the published layouts, and what goes wrong in them."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from scipy.io import savemat

from data_tools.formats import qvhighlights, summe, tvsum, videoxum
from data_tools.formats.timeline import Problem, checked_scores, segments, time_range
from dsmoe_vl.errors import DataError
from tests.support.datasets import read
from tests.unit.formats.video_files import problems, write

NAN = math.nan

# Time ranges and scores


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        ([12.5, 3.0], "reversed timestamps: 12.5 to 3.0 s"),
        ([3.0, 3.0], "empty timestamps: 3.0 to 3.0 s"),
        ([-1.0, 3.0], "timestamps outside of the video: -1.0 to 3.0 s of 10.0 s"),
        ([10.0, 12.0], "timestamps outside of the video: 10.0 to 12.0 s of 10.0 s"),
        ([NAN, 3.0], "invalid timestamps: nan"),
        ([0.0, math.inf], "invalid timestamps: inf"),
        ([0.0, 10**400], "invalid timestamps: 1000"),
        ([1.0], "invalid timestamps: [1.0]"),
        (None, "invalid timestamps: None"),
        ([None, 3.0], "invalid timestamps: None"),
    ],
)
def test_time_ranges_that_hold_nothing_are_problems(pair, problem):
    with pytest.raises(Problem) as raised:
        time_range(pair, 10.0)
    assert str(raised.value).startswith(problem)


def test_a_time_range_ends_where_the_video_ends():
    assert time_range([2, 10.4], 10.0) == (2.0, 10.0)
    assert time_range([2, 10.4]) == (2.0, 10.4)


def test_segments_come_in_time_order_and_bad_ones_are_named_by_their_place():
    used, rejected = segments("v", [[5, 9], [4, 1], [0, 6], [0, 1]], ["late", "never", " early  on ", " "], 8.0)
    assert used == [
        {"start_seconds": 0.0, "end_seconds": 6.0, "caption": "early on"},
        {"start_seconds": 5.0, "end_seconds": 8.0, "caption": "late"},
    ]
    assert problems(rejected) == {"v#2": "reversed timestamps: 4.0 to 1.0 s", "v#4": "empty caption: 0.0 to 1.0 s"}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([[0, NAN]], "invalid scores: 1 NaN or infinite"),
        ([[0, 1], [0]], "invalid scores"),
        ([[0, "many"]], "invalid scores"),
        ([[0, {}]], "invalid scores"),
        ([], "invalid scores: shape [0]"),
        (None, "invalid scores"),
        ([[0, 2]], "scores out of range: 0 to 2, not 0 to 1"),
        ([[-1, 0]], "scores out of range: -1 to 0, not 0 to 1"),
    ],
)
def test_scores_that_are_none_are_problems(rows, problem):
    with pytest.raises(Problem) as raised:
        checked_scores(rows, 0, 1)
    assert str(raised.value).startswith(problem)


# VideoXum


def videoxum_row(**changes):
    row = {
        "video_id": "v_x",
        "duration": 3.4,
        "sampled_frames": 3,
        "timestamps": [[0.0, 1.5], [1.0, 3.4]],
        "tsum": ["A woman enters. ", " She dances."],
        "vsum": [[[0, 1]] * 10] * 2,
        "vsum_onehot": [[0, 0, 1]] * 4 + [[0, 1, 0]] * 6,
    }
    return {**row, **changes}


def test_videoxum_keeps_a_curve_for_each_annotator(read_videos, tmp_path):
    (record,) = read_videos(videoxum, [videoxum_row()])
    assert record.captions == [record.meta["summary"]] == ["A woman enters. She dances."]
    assert record.media == tmp_path / "videos" / "v_x.mp4"
    assert record.meta["saliency"] == [[0, 0, 1]] * 4 + [[0, 1, 0]] * 6
    assert [part["end_seconds"] for part in record.meta["segments"]] == [1.5, 3.4]


def test_videoxum_reversed_times_leave_the_summary_as_published(read_videos):
    found = read_videos(videoxum, [videoxum_row(timestamps=[[1.5, 0.0], [1.0, 3.4]])])
    assert problems(found) == {"v_x#1": "reversed timestamps: 1.5 to 0.0 s"}
    assert found[0].meta["summary"] == "A woman enters. She dances."
    assert len(found[0].meta["segments"]) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vsum_onehot": [[0, 1, 0], [0, 1]]}, "invalid scores: not numbers"),
        ({"vsum_onehot": [[0, NAN, 0]]}, "invalid scores: 1 NaN"),
        ({"vsum_onehot": [[0, 2, 0]]}, "scores out of range: 0 to 2"),
        ({"duration": None}, "invalid duration: None"),
        ({"tsum": [], "timestamps": []}, "empty summary"),
    ],
)
def test_videoxum_rejects_what_is_no_summary(read_videos, changes, problem):
    assert problems(read_videos(videoxum, [videoxum_row(**changes)]))["v_x"].startswith(problem)


def test_videoxum_refuses_other_files(read_videos):
    with pytest.raises(DataError, match=r"a list of videos"):
        read_videos(videoxum, {"v_x": {}})
    with pytest.raises(DataError, match=r"entry 1: no 'vsum_onehot'"):
        broken = videoxum_row()
        del broken["vsum_onehot"]
        read_videos(videoxum, [videoxum_row(), broken])


# TVSum

TVSUM_INFO = 'category\tvideo_id\ttitle\turl\tlength\r\nVT\tabc\t"Tires" and how to\thttp://a\t0:10\r\n'


def tvsum_lines(curves, video="abc"):
    return "".join(f"{video}\tVT\t{','.join(str(score) for score in curve)}\n" for curve in curves)


def tvsum_records(read_videos, tmp_path, annotations, info=TVSUM_INFO):
    return read_videos(tvsum, annotations, "--info", write(tmp_path / "info.tsv", info), name="anno.tsv")


def test_tvsum_takes_every_15th_score(read_videos, tmp_path):
    scores = np.random.default_rng(0).integers(1, 6, (20, 47))
    (record,) = tvsum_records(read_videos, tmp_path, tvsum_lines(scores))
    assert record.meta["saliency"] == ((scores[:, [0, 15, 30, 45]] - 1) / 4).tolist()
    assert record.meta["annotated_frames"] == 47
    assert record.captions == [record.meta["summary"]]
    assert record.meta["summary"] == 'Tires" and how to'
    assert (record.meta["url"], record.meta["category"]) == ("http://a", "VT")
    assert record.media == tmp_path / "videos" / "abc.mp4"


def test_tvsum_real_annotators(read_videos, tmp_path, shared_data):
    folder = shared_data / "video_summary_labels_dsnet" / "custom_data" / "labels"
    users = np.array(json.loads((folder / "EE-bNr36nyA.json").read_text())["user_summary"])
    info = "VU\tEE-bNr36nyA\tA bus\thttp://b\t1:38\n"
    (record,) = tvsum_records(read_videos, tmp_path, tvsum_lines(1 + 4 * users, "EE-bNr36nyA"), info)
    assert record.meta["annotated_frames"] == 2941
    assert record.meta["saliency"] == users[:, ::15].tolist()
    assert len(json.dumps(record.meta)) < 30_000


def test_tvsum_annotators_a_frame_apart_are_cut_to_the_shortest(read_videos, tmp_path):
    (record,) = tvsum_records(read_videos, tmp_path, tvsum_lines([[5] * 31, [1] * 30]))
    assert record.meta["annotated_frames"] == 30
    assert record.meta["saliency"] == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("curves", "problem"),
    [
        ([[1] * 60, [1] * 30], "unequal annotations: 30 to 60 frames"),
        ([[1, 7, 1]], "scores out of range: 1 to 7, not 1 to 5"),
        ([[1, "nan", 1]], "invalid scores: 1 NaN"),
        ([[1, "", 1]], "invalid scores: not numbers"),
    ],
)
def test_tvsum_rejects_what_are_no_scores(read_videos, tmp_path, curves, problem):
    assert problems(tvsum_records(read_videos, tmp_path, tvsum_lines(curves)))["abc"].startswith(problem)


def test_tvsum_videos_in_one_of_the_files_are_rejected(read_videos, tmp_path):
    found = problems(tvsum_records(read_videos, tmp_path, tvsum_lines([[1] * 30], "xyz")))
    assert found["xyz"].startswith("no title: none in")
    assert found["abc"].startswith("no scores: none in")


def test_tvsum_refuses_other_files(read_videos, tmp_path):
    with pytest.raises(DataError, match=r"--annotations .*anno.tsv, line 1: 1 cells between tabs, not 3"):
        tvsum_records(read_videos, tmp_path, "abc,VT,1\n")
    with pytest.raises(DataError, match=r"--info .*info.tsv, line 1: 2 cells between tabs, not 5"):
        tvsum_records(read_videos, tmp_path, tvsum_lines([[1]]), "abc\ttitle\n")


# SumMe


def summe_records(tmp_path, scores, name="Saving dolphines", **changes):
    (tmp_path / "GT").mkdir(exist_ok=True)
    (tmp_path / "videos").mkdir(exist_ok=True)
    cells = np.empty((1, 1), object)
    cells[0, 0] = np.array([[1.0, 2.5]])
    variables = {"user_score": scores, "nFrames": len(scores), "FPS": 25.0, "segments": cells}
    savemat(tmp_path / "GT" / f"{name}.mat", {**variables, **changes})
    return read(summe, "--videos", tmp_path / "videos", "--annotations", tmp_path / "GT")


def test_summe_marks_the_parts_that_a_user_mostly_chose(tmp_path):
    scores = np.zeros((40, 2))
    scores[13:21, 0] = 7  # 8 of the 14 frames of the second of three parts; any score above 0 is a choice
    scores[0:6, 1] = 1  # 6 of 13
    scores[33:40, 1] = 2  # 7 of 14
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "St_Maarten Landing.webm").touch()
    (record,) = summe_records(tmp_path, scores, "St_Maarten Landing")
    assert record.identifier == "St_Maarten Landing"
    assert record.media == tmp_path / "videos" / "St_Maarten Landing.webm"
    assert (record.captions, record.meta["summary"]) == ([], "St Maarten Landing")
    assert record.meta["saliency"] == [[0, 1, 0], [0, 0, 1]]
    assert record.meta["annotated_frames"] == 40


def test_summe_parts_keep_the_agreement_of_users(tmp_path, shared_data):
    folder = shared_data / "video_summary_labels_dsnet" / "custom_data" / "labels"
    frames = np.array(json.loads((folder / "EE-bNr36nyA.json").read_text())["user_summary"])
    (record,) = summe_records(tmp_path, frames.T)
    parts = np.array(record.meta["saliency"])
    assert parts.shape == (20, 197)

    def agreement(selected):
        both = selected @ selected.T
        sizes = selected.sum(1)
        return 2 * both / (sizes[:, None] + sizes)

    np.testing.assert_allclose(parts.mean(1), frames.mean(1), atol=0.01)
    np.testing.assert_allclose(agreement(parts), agreement(frames), atol=0.06)


@pytest.mark.parametrize(
    ("scores", "changes", "problem"),
    [
        (np.full((30, 2), NAN), {}, "invalid scores: 60 NaN"),
        (np.full((30, 2), -1.0), {}, "scores out of range: -1 to -1"),
        (np.ones((2, 30)), {"nFrames": 30}, "unequal annotations: user_score of 2 frames, nFrames [30]"),
        (np.zeros((0, 0)), {}, "invalid scores: shape"),
    ],
)
def test_summe_rejects_what_are_no_scores(tmp_path, scores, changes, problem):
    assert problems(summe_records(tmp_path, scores, **changes))["Saving dolphines"].startswith(problem)


def test_summe_refuses_other_files(tmp_path):
    for name in ("GT", "videos"):
        (tmp_path / name).mkdir()
    path = tmp_path / "GT" / "dolphines.mat"
    savemat(path, {"user_score": 1})
    with pytest.raises(DataError, match=r"dolphines.mat: no nFrames"):
        read(summe, "--videos", tmp_path / "videos", "--annotations", tmp_path / "GT")
    whole = path.read_bytes()
    for content in (b"", b"no matlab" * 40, whole[:150], b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"dolphines.mat: not a MATLAB file, or saved without -v7"):
            read(summe, "--videos", tmp_path / "videos", "--annotations", tmp_path / "GT")
    with pytest.raises(DataError, match=r"no .mat files: give the folder GT"):
        read(summe, "--videos", tmp_path / "videos", "--annotations", tmp_path / "videos")


def test_summe_says_how_to_install_scipy(tmp_path, monkeypatch):
    summe_records(tmp_path, np.ones((30, 2)))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"pip install 'dsmoe-vl\[summe\]'"):
        read(summe, "--videos", tmp_path / "videos", "--annotations", tmp_path / "GT")


# QVHighlights


def qv_line(**changes):
    row = {
        "qid": 7,
        "query": "a cat sleeps",
        "duration": 9,
        "vid": "ab_60.0_69.0",
        "relevant_windows": [[2, 4], [8, 10]],
        "relevant_clip_ids": [1, 4],
        "saliency_scores": [[4, 2, 0], [3, 1, 1]],
    }
    return json.dumps({**row, **changes}) + "\n"


def test_qvhighlights_scores_all_clips_of_the_video(read_videos, tmp_path):
    (tmp_path / "videos" / "ab_60.0_69.0.mkv").touch()
    (record,) = read_videos(qvhighlights, qv_line())
    assert (record.identifier, record.captions) == ("7", ["a cat sleeps"])
    assert record.media == tmp_path / "videos" / "ab_60.0_69.0.mkv"
    assert (record.meta["content"], record.meta["summary"]) == ("ab_60.0_69.0", "a cat sleeps")
    assert record.meta["saliency"] == [[0, 1, 0, 0, 0.75], [0, 0.5, 0, 0, 0.25], [0, 0, 0, 0, 0.25]]
    assert record.meta["segments"] == [
        {"start_seconds": 2.0, "end_seconds": 4.0, "caption": "a cat sleeps"},
        {"start_seconds": 8.0, "end_seconds": 9.0, "caption": "a cat sleeps"},
    ]


def test_qvhighlights_test_queries_have_no_labels(read_videos):
    rows = [
        {"qid": 1, "query": "a cat", "duration": 9, "vid": "v"},
        {"qid": 2, "query": "a dog", "duration": 9, "vid": "v"},
    ]
    found = read_videos(qvhighlights, "\n".join(map(json.dumps, rows)))
    assert [(record.identifier, record.captions, record.meta) for record in found] == [
        ("1", ["a cat"], {"content": "v"}),
        ("2", ["a dog"], {"content": "v"}),
    ]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"relevant_clip_ids": [1, 5]}, "clips outside of the video: [1, 5], not from 0 to 4"),
        ({"relevant_clip_ids": [1, -1]}, "clips outside of the video"),
        ({"relevant_clip_ids": [1]}, "unequal annotations: scores of 2 clips for 1 relevant ones"),
        ({"saliency_scores": [[4, 2, 5], [3, 1, 1]]}, "scores out of range: 1 to 5, not 0 to 4"),
        ({"saliency_scores": [[4, 2], [3, 1, 1]]}, "invalid scores"),
        ({"saliency_scores": [[4, 2, NAN], [3, 1, 1]]}, "invalid scores: 1 NaN"),
        ({"duration": -2}, "invalid duration: -2.0 s"),
        ({"relevant_windows": None}, "invalid timestamps: None"),
        ({"query": None}, "empty caption: None"),
    ],
)
def test_qvhighlights_rejects_labels_that_make_no_sense(read_videos, changes, problem):
    found = problems(read_videos(qvhighlights, qv_line(**changes) + qv_line(qid=8)))
    assert list(found) == ["7"]
    assert found["7"].startswith(problem)


def test_qvhighlights_query_goes_on_without_a_reversed_window(read_videos):
    found = read_videos(qvhighlights, qv_line(relevant_windows=[[4, 2], [8, 10]]))
    assert problems(found) == {"7#1": "reversed timestamps: 4.0 to 2.0 s"}
    assert len(found[0].meta["segments"]) == 1


def test_qvhighlights_refuses_other_files(read_videos):
    unscored = {"qid": 1, "query": "a", "duration": 1, "vid": "v", "relevant_windows": [], "relevant_clip_ids": []}
    with pytest.raises(DataError, match=r"line 2: no 'saliency_scores'"):
        read_videos(qvhighlights, qv_line() + json.dumps(unscored))
    with pytest.raises(DataError, match=r"line 1: no 'vid'"):
        read_videos(qvhighlights, '{"qid": 1, "query": "a", "duration": 1}')
