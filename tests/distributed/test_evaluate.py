"""`launch/evaluate.py` on one rank and on two: every sample once, the same scores, every rank ends."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from tests.distributed.ranks import REPOSITORY, free_port, try_ranks
from tests.support.reports import Page
from tests.support.runs import SHOWS_SAMPLES, TRAIN, finish, python, start
from tests.support.tars import write_index, write_tar

EVALUATE = REPOSITORY / "launch" / "evaluate.py"
SAMPLES = 7  # odd: two ranks have unequal shares
TASKS = ("tasks.retrieval.weight=1.0", "tasks.summary.weight=1.0")


@pytest.fixture(scope="module")
def run(tiny):
    """A run that has learned all tasks, if little."""
    run = tiny.folder / "runs" / "all_tasks"
    steps = ["run.steps=2", "run.checkpoint_every=2", "run.evaluate_every=2", "data.pack_length=512"]
    result = finish(start(python(TRAIN, *tiny.arguments(run, *steps, SHOWS_SAMPLES, *TASKS))))
    assert result.status == 0, result.out + result.err
    return run


@pytest.fixture(scope="module")
def annotated(tiny):
    """A film of many scenes with four annotators, as each converter would describe it; one that cannot be read."""
    folder, rng = tiny.folder / "annotated", np.random.default_rng(0)
    videos = list(iterate_samples(SourceConfig.at(tiny.data / "videos_train")))
    members = []
    for number in range(SAMPLES):
        source, video = ("tvsum", "summe", "videoxum", "qvhighlights")[number % 4], videos[number]
        curves = rng.integers(0, 2 if source in ("summe", "videoxum") else 5, (4, 12))
        meta = {"source": source, "saliency": (curves / curves.max()).tolist(), "annotated_frames": 170}
        meta |= {name: video.meta[name] for name in ("duration_seconds", "captions", "summary")}
        media = b"no video" if number == 2 else video.media
        members += [(f"v{number}.mp4", media), (f"v{number}.json", json.dumps({**meta, "id": f"v{number}"}).encode())]
    write_tar(folder / "00000.tar", members)
    write_index(folder, {"00000.tar": SAMPLES})
    return folder


def copy(run: Path, name: str) -> Path:
    """The run under another name, so that evaluations do not write over each other."""
    return Path(shutil.copytree(run, run.with_name(name)))


def scores(run: Path) -> dict:
    return json.loads((run / "eval.json").read_text())


def test_two_ranks_score_as_one_does(tiny, run, annotated):
    alone, together = copy(run, "alone_all"), copy(run, "together")
    images = str(tiny.data / "images_eval")
    arguments = ["--data", images, str(annotated), "--limit", str(SAMPLES), "--gallery", "5", "--max-tokens", "6"]
    result = finish(start(python(EVALUATE, "--run", alone, *arguments)))
    assert result.status == 0, result.err
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    launcher += ["--master_port", str(free_port()), str(EVALUATE)]
    both = finish(start([*launcher, "--run", str(together), *arguments]))
    assert both.status == 0, both.out + both.err

    one, two = scores(alone), scores(together)
    assert [list(tasks) for tasks in one.values()] == [["caption", "retrieval", "summary"][:n] for n in (2, 3)]
    for folder, tasks in one.items():
        for task, values in tasks.items():
            assert two[folder][task] == pytest.approx(values, abs=1e-6), (folder, task)
    assert one[images]["caption"]["samples"] == SAMPLES
    assert one[images]["retrieval"]["samples"] == 5
    found = one[str(annotated)]
    assert found["caption"]["samples"] == found["summary"]["samples"] == SAMPLES - 1  # one cannot be read
    assert {"tvsum_f", "summe_f", "videoxum_f", "user_kendall_tau", "user_spearman_rho"} <= set(found["summary"])
    # The same examples, whoever has met them, and as many tokens of captions (of a gallery, ranks may embed too many).
    pages = [Page((folder / "report.html").read_text(encoding="utf-8")) for folder in (alone, together)]
    sections = [[section["id"] for section in page.named("section")] for page in pages]
    assert sections == [["metrics", "captions", "retrieval", "summaries", "routing", "plan"]] * 2
    for shown in ("dd", "h3", "li"):
        assert pages[0].words(shown) == pages[1].words(shown)
    counted = [re.findall(r"captions: [\d,]+ assignments", page.words("figcaption")) for page in pages]
    assert counted[0] == counted[1] and len(counted[0]) == 1
    assert len(pages[0].named("img")) == len(pages[1].named("img")) > 30
    # Rank 0 alone speaks and writes: what one process prints, every reference once.
    assert both.out.count("reference") == result.out.count("reference") > 0

    step = 2
    for name in ("images_eval", "annotated"):
        (events,) = (together / "tensorboard" / "eval" / name).iterdir()
        curves = EventAccumulator(str(events)).Reload()
        (point,) = curves.Scalars("eval/retrieval/media_to_text_r1")
        folder = images if name == "images_eval" else str(annotated)
        assert point.step == step and point.value == pytest.approx(two[folder]["retrieval"]["media_to_text_r1"])
    assert [tag for tag in curves.Tags()["scalars"] if tag == "eval/summary/tvsum_f"]


def test_torchrun_starts_it_too(run, annotated):
    """With --run-dir: torchrun takes --run for its own."""
    torchrun = copy(run, "evaluated_under_torchrun")
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port()), str(EVALUATE), "--run-dir", str(torchrun)]
    result = finish(start([*launcher, "--data", str(annotated), "--tasks", "summary", "--max-tokens", "2"]))
    assert result.status == 0, result.out + result.err
    assert scores(torchrun)[str(annotated)]["summary"]["samples"] == SAMPLES - 1


@pytest.fixture(scope="module")
def broken(tiny, annotated):
    """The JSON of sample 1, which is rank 1's, is damaged too. 3 has no caption, 4 is for captions only."""
    members = []
    for number, sample in enumerate(iterate_samples(SourceConfig.at(annotated))):
        meta = {**sample.meta, "captions": sample.meta["captions"] if number != 3 else []}
        meta |= {"tasks": ["caption"]} if number == 4 else {}
        content = b"{" if number == 1 else json.dumps(meta).encode()
        members += [(f"{sample.key}.mp4", sample.media), (f"{sample.key}.json", content)]
    folder = tiny.folder / "broken"
    write_tar(folder / "00000.tar", members)
    write_index(folder, {"00000.tar": SAMPLES})
    return folder


def test_too_many_bad_samples_end_both_ranks(run, broken):
    """Each of them has one, which alone would be within the budget of 1 in 100."""
    ended = copy(run, "ended")
    ranks = try_ranks(EVALUATE, ["--run", str(ended), "--data", str(broken), "--max-tokens", "2"], 2)
    assert [rank.status for rank in ranks] == [2, 2]
    errors = "".join(rank.err for rank in ranks)
    assert errors.count("error (rank") == 1 and "Traceback" not in errors and not (ended / "eval.json").exists()
    assert "2 of 7 samples are bad, more than data.max_bad_fraction = 0.01" in errors
    assert "raise the budget with --max-bad-fraction" in errors


def test_what_is_passed_over_is_counted_and_named(run, broken):
    """The same counts from one rank and from two, which say them once."""
    alone, together = copy(run, "passed_alone"), copy(run, "passed_together")
    arguments = ["--data", str(broken), "--max-tokens", "2", "--max-bad-fraction", "0.5"]
    result = finish(start(python(EVALUATE, "--run", alone, *arguments)))
    assert result.status == 0, result.err
    ranks = try_ranks(EVALUATE, ["--run", str(together), *arguments], 2)
    assert [rank.status for rank in ranks] == [0, 0], "".join(rank.err for rank in ranks)
    for out, folder in ((result.out, alone), ("".join(rank.out for rank in ranks), together)):
        found = scores(folder)[str(broken)]
        counts = {
            task: tuple(values.get(name, 0) for name in ("samples", "bad_samples", "other_samples"))
            for task, values in found.items()
        }
        assert counts == {"caption": (4, 2, 1), "retrieval": (3, 2, 2), "summary": (4, 2, 1)}
        assert out.count("bad and passed over: 2 of 7 samples") == 3
        assert out.count("00000.tar, number 1: malformed text or JSON") == out.count("00000.tar, v2: ") == 3
        for task, others in (
            ("caption", "1 without a caption"),
            ("retrieval", "1 for other tasks, 1 without a caption"),
            ("summary", "1 for other tasks"),
        ):
            assert f"{broken}: {task}: not of this task, of 7 samples: {others}\n" in out
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert "bad samples, passed over" in page and "samples that are not of this task" in page


def test_a_user_error_is_told_once(tmp_path):
    ranks = try_ranks(EVALUATE, ["--run", str(tmp_path / "none")], 2)
    assert [rank.status for rank in ranks] == [2, 2]
    errors = "".join(rank.err for rank in ranks)
    assert errors.count("no complete checkpoint under") == 1 and "Traceback" not in errors
