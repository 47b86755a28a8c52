"""Readers of captioned videos: tiny copies of the published layouts, and what is known to go wrong in them."""

from __future__ import annotations

import math

import pytest

from data_tools.formats import activitynet, msrvtt, msvd, qvhighlights, summe, tvsum, vatex, videoxum, webvid
from dsmoe_vl.errors import DataError
from tests.support.datasets import read
from tests.unit.formats.video_files import by_id, problems, write

NAN = math.nan

# MSR-VTT


def msrvtt_file(**first):
    video = {"video_id": "video0", "url": "http://a", "start time": 1.5, "end time": 9.0, "split": "train", **first}
    sentences = [("video1", "a cat"), ("video0", "a dog"), ("video0", "two dogs"), ("video0", "a dog")]
    return {
        "info": {},
        "videos": [video, {"video_id": "video1", "url": "http://b", "split": "test"}],
        "sentences": [{"video_id": name, "caption": text, "sen_id": i} for i, (name, text) in enumerate(sentences)],
    }


def test_msrvtt_gives_a_record_a_clip_without_repeated_captions(read_videos, tmp_path):
    first, second = read_videos(msrvtt, msrvtt_file())
    assert (first.identifier, first.captions) == ("video0", ["a dog", "two dogs"])
    assert first.media == tmp_path / "videos" / "video0.mp4"
    assert first.meta == {"url": "http://a", "url_start_seconds": 1.5, "url_end_seconds": 9.0}
    assert (second.identifier, second.captions, second.meta, second.problem) == (
        "video1",
        ["a cat"],
        {"url": "http://b"},
        "",
    )


def test_msrvtt_part_selects_by_split_and_says_which_there_are(read_videos):
    assert [record.identifier for record in read_videos(msrvtt, msrvtt_file(), "--part", "test")] == ["video1"]
    with pytest.raises(DataError, match=r"--part validate: no such `split` in .*, which has test, train"):
        read_videos(msrvtt, msrvtt_file(), "--part", "validate")


def test_msrvtt_subset_replaces_the_captions_where_it_has_sentences(read_videos, tmp_path):
    test = write(tmp_path / "test.csv", 'key,vid_key,video_id,sentence\nret0,msr1,video1,"a cat, asleep"\n')
    (record,) = read_videos(msrvtt, msrvtt_file(), "--subset", test)
    assert (record.identifier, record.captions) == ("video1", ["a cat, asleep"])
    train = write(tmp_path / "train.csv", "video_id\nvideo0\n")
    (record,) = read_videos(msrvtt, msrvtt_file(), "--subset", train)
    assert (record.identifier, record.captions) == ("video0", ["a dog", "two dogs"])
    other = write(tmp_path / "other.csv", "name\nvideo0\n")
    with pytest.raises(DataError, match=r"--subset .*other.csv, line 2: no 'video_id' among name"):
        read_videos(msrvtt, msrvtt_file(), "--subset", other)


def test_msrvtt_clips_with_impossible_times_or_unlisted_are_not_used(read_videos):
    found = read_videos(msrvtt, msrvtt_file(**{"start time": NAN}))
    assert problems(found) == {"video0": "invalid timestamps: nan"}
    content = msrvtt_file()
    content["sentences"].append({"video_id": "video7", "caption": "a fish"})
    unlisted = by_id(read_videos(msrvtt, content))["video7"]
    assert (unlisted.media, unlisted.captions) == (None, ["a fish"])


@pytest.mark.parametrize("content", [[], {"videos": [{}], "sentences": []}, {"videos": []}, {"videos": [3]}, "{"])
def test_msrvtt_refuses_other_files(read_videos, content):
    with pytest.raises(DataError, match=r"--annotations .*annotations.json: not "):
        read_videos(msrvtt, content)


# MSVD

MSVD_TEXT = "# MSVD\n\n-4ws_uPC_5_15 a squirrel eats\nmv89psg6zh4_33_46 a bird bathes\n-4ws_uPC_5_15 it  chews\n"
MSVD_CSV = """\
VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description
-4ws_uPC,5,15,1,clean,10,English,a squirrel eats
-4ws_uPC,5,15,2,clean,10,German,"ein Hörnchen, das frisst"
mv89psg6zh4,33,46,3,unverified,9,English,"a bird, bathing"
mv89psg6zh4,50,60,3,unverified,9,Slovene,ptica
"""


def test_msvd_text_and_csv_are_told_apart_by_content(read_videos, tmp_path):
    (tmp_path / "videos" / "-4ws_uPC_5_15.avi").touch()
    text = by_id(read_videos(msvd, MSVD_TEXT, name="corpus.csv"))
    table = by_id(read_videos(msvd, "\ufeff" + MSVD_CSV, name="corpus.txt"))
    assert list(text) == list(table) == ["-4ws_uPC_5_15", "mv89psg6zh4_33_46"]
    assert text["-4ws_uPC_5_15"].captions == ["a squirrel eats", "it  chews"]
    assert table["-4ws_uPC_5_15"].captions == ["a squirrel eats"]  # English alone
    assert table["mv89psg6zh4_33_46"].captions == ["a bird, bathing"]
    for record in (text["-4ws_uPC_5_15"], table["-4ws_uPC_5_15"]):
        assert record.media == tmp_path / "videos" / "-4ws_uPC_5_15.avi"
        assert record.meta["url"].endswith("=-4ws_uPC")
        assert (record.meta["url_start_seconds"], record.meta["url_end_seconds"]) == (5, 15)


def test_msvd_refuses_other_files(read_videos):
    with pytest.raises(DataError, match=r"line 2: 'squirrel' is not VIDEOID_start_end"):
        read_videos(msvd, "# MSVD\nsquirrel eats\n")
    with pytest.raises(DataError, match=r"line 2: Start and End must be whole seconds, not 'mv_33_'"):
        read_videos(msvd, "VideoID,Start,End,Language,Description\nmv,33,,English,a bird\n")
    with pytest.raises(DataError, match=r"no 'End' among VideoID, Start"):
        read_videos(msvd, "VideoID,Start\nmv,33\n")


# VATEX

VATEX = [
    {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["a man", "a person"], "chCap": ["一个人"]},
    {"videoID": "b_000000_000010", "chCap": ["猫"]},
]


def test_vatex_reads_one_language(read_videos, tmp_path):
    english, lacking = read_videos(vatex, VATEX)
    assert (english.identifier, english.captions) == ("Ptf_2VRj-V0_000122_000132", ["a man", "a person"])
    assert english.media == tmp_path / "videos" / "Ptf_2VRj-V0_000122_000132.mp4"
    assert english.meta == {"url": "https://www.youtube.com/watch?v=Ptf_2VRj-V0"}
    assert lacking.captions == []  # which the converter rejects
    assert [record.captions for record in read_videos(vatex, VATEX, "--language", "zh")] == [["一个人"], ["猫"]]


def test_vatex_test_files_without_captions_are_refused(read_videos):
    with pytest.raises(DataError, match=r"no enCap in it: the private test file has no captions"):
        read_videos(vatex, [{"videoID": "a_000000_000010"}])
    with pytest.raises(DataError, match=r"no chCap in it: .*--language en"):
        read_videos(vatex, [{"videoID": "a_000000_000010", "enCap": ["a"]}], "--language", "zh")


@pytest.mark.parametrize("content", [{"a": 1}, [{"enCap": []}], [3], 3])
def test_vatex_refuses_other_files(read_videos, content):
    with pytest.raises(DataError, match=r"--annotations .*: not a VATEX file"):
        read_videos(vatex, content)


# WebVid

WEBVID = """\
videoid,contentUrl,duration,page_dir,name
12,https://x/12.mp4,PT00H00M10S,000001_000050,"Travel blogger, shooting"
13,https://x/13.mp4,PT00H00M30S,000001_000050,A cat
12,https://x/12.mp4,PT00H00M10S,000051_000100,Travel blogger
"""


def test_webvid_finds_copies_with_and_without_the_page_folder(read_videos, tmp_path):
    paged = tmp_path / "videos" / "000001_000050" / "12.mp4"
    paged.parent.mkdir()
    for path in (paged, tmp_path / "videos" / "13.webm"):
        path.touch()
    first, second, _ = read_videos(webvid, WEBVID)
    assert (first.identifier, first.captions) == ("12", ["Travel blogger, shooting"])
    assert first.media == paged
    assert first.meta == {"url": "https://x/12.mp4"}
    assert second.media == tmp_path / "videos" / "13.webm"
    (tmp_path / "videos" / "13.webm").unlink()
    assert read_videos(webvid, WEBVID)[1].media == tmp_path / "videos" / "000001_000050" / "13.mp4"  # reported missing


def test_webvid_rows_of_a_video_crawled_twice_are_rejected(read_videos):
    assert problems(read_videos(webvid, WEBVID)) == {"12#4": "repeated video: line 4, first on line 2"}


def test_webvid_refuses_other_files(read_videos):
    with pytest.raises(DataError, match=r"no 'contentUrl' among videoid, name"):
        read_videos(webvid, "videoid,name\n1,a\n")
    with pytest.raises(DataError, match=r"line 2: no videoid"):
        read_videos(webvid, "videoid,contentUrl,page_dir,name\n,http://a,p,a\n")


# ActivityNet Captions


def activity(timestamps, sentences, duration=80.0):
    return {"duration": duration, "timestamps": timestamps, "sentences": sentences}


def test_activitynet_sentences_become_a_paragraph_in_time_order(read_videos, tmp_path):
    entry = activity([[30.0, 95.2], [0, 40.5]], [" She  dances.", "A woman enters."])
    (record,) = read_videos(activitynet, {"v_x": entry})
    assert record.captions == ["A woman enters. She dances."]
    assert record.media == tmp_path / "videos" / "v_x.mp4"
    assert record.meta == {
        "url": "https://www.youtube.com/watch?v=x",
        "segments": [
            {"start_seconds": 0.0, "end_seconds": 40.5, "caption": "A woman enters."},
            {"start_seconds": 30.0, "end_seconds": 80.0, "caption": "She dances."},  # overlaps; cut at the duration
        ],
    }


def test_activitynet_video_goes_on_without_a_reversed_sentence(read_videos):
    found = read_videos(activitynet, {"v_x": activity([[0, 5], [12.5, 3.0], [7, 7]], ["One.", "Two.", "Three."])})
    assert problems(found) == {
        "v_x#2": "reversed timestamps: 12.5 to 3.0 s",
        "v_x#3": "empty timestamps: 7.0 to 7.0 s",
    }
    assert found[0].captions == ["One."]


def test_activitynet_second_file_adds_paragraphs(read_videos, tmp_path):
    second = write(
        tmp_path / "val_2.json", {"v_x": activity([[1, 2], [9, 8]], ["Uno.", "Dos."]), "v_y": activity([], [])}
    )
    found = by_id(read_videos(activitynet, {"v_x": activity([[0, 5]], ["One."])}, second))
    assert list(found) == ["v_x", "v_x@2#2", "v_y"]
    assert found["v_x"].captions == ["One.", "Uno."]
    assert [(part["annotator"], part["caption"]) for part in found["v_x"].meta["segments"]] == [
        (1, "One."),
        (2, "Uno."),
    ]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (activity([[0, 1]], ["One."], NAN), "invalid duration: nan"),
        (activity([[0, 1]], ["One."], 0), "invalid duration: 0.0 s"),
        (activity([[0, 1]], ["One.", "Two."]), "invalid timestamps: 1 for 2 sentences"),
        (activity(None, ["One."]), "invalid timestamps: None for ['One.']"),
    ],
)
def test_activitynet_rejects_videos_whose_annotations_make_no_sense(read_videos, entry, problem):
    good = activity([[0, 1]], ["One."])
    assert problems(read_videos(activitynet, {"v_x": entry, "v_y": good})) == {"v_x": problem}


def test_activitynet_refuses_other_files(read_videos):
    with pytest.raises(DataError, match=r"the list of test videos has no captions"):
        read_videos(activitynet, ["v_x"])
    with pytest.raises(DataError, match=r"'v_x': no 'sentences'"):
        read_videos(activitynet, {"v_x": {"duration": 1, "timestamps": []}})


# All


FORMATS = [activitynet, msrvtt, msvd, qvhighlights, summe, tvsum, vatex, videoxum, webvid]


@pytest.mark.parametrize("module", FORMATS, ids=lambda module: module.NAME)
def test_missing_folders_and_files_are_named(module, tmp_path):
    info = ["--info", tmp_path / "none.tsv"] if module is tvsum else []
    with pytest.raises(DataError, match=r"--videos .*nowhere: no such folder"):
        read(module, "--videos", tmp_path / "nowhere", "--annotations", tmp_path / "none.json", *info)
    with pytest.raises(DataError, match=r"--annotations .*none.json: [Nn]o such "):
        read(module, "--videos", tmp_path, "--annotations", tmp_path / "none.json", *info)
