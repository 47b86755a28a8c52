"""What an evaluation passes over: which samples a task uses, what is counted and named, and when it ends."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.config.task_table import TASKS, task_number
from dsmoe_vl.data.contents import why_unused
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.examples import Counts
from dsmoe_vl.evaluation.passed_over import PassedOver
from dsmoe_vl.evaluation.task_evaluation import Folder, written
from tests.support.samples import sample
from tests.support.tars import write_tar
from tests.support.threads import Threads


def task(name):
    return TASKS[task_number(name)]


def test_which_samples_a_task_uses():
    """As in training: lists decide, then what a sample has; one that a list asks for is bad if it lacks something."""
    whole = sample("image")
    bare = replace(whole, meta={}, text="")
    reasons = {
        "caption": why_unused(bare, task("caption")),
        "retrieval": why_unused(bare, task("retrieval")),
        "summary": why_unused(whole, task("summary")),
        "transcript": why_unused(whole, task("transcript")),
    }
    assert {name: reason.partition(":")[0] for name, reason in reasons.items()} == {
        "caption": "no caption", "retrieval": "no caption", "summary": "no summary", "transcript": "no recording",
    }  # fmt: skip
    for lists in (
        {"meta": {**whole.meta, "tasks": ["caption"]}},
        {"source": SourceConfig("s", "p", tasks=("caption",))},
    ):
        listed = replace(whole, **lists)
        assert why_unused(listed, task("caption")) == ""
        assert why_unused(listed, task("retrieval")).startswith("for other tasks: ")
        lacking = replace(listed, media=None, media_type="", names=())
        with pytest.raises(DataError, match="no image or video"):
            why_unused(lacking, task("caption"))
    assert why_unused(replace(whole, meta={**whole.meta, "tasks": []}), task("caption")).startswith("for other tasks: ")


@pytest.fixture
def folder(tmp_path):
    """10 samples in two shards: number 2 has a malformed JSON, 4 no caption, 7 a text that is not UTF-8."""
    for shard in range(2):
        members = []
        for number in range(5 * shard, 5 * shard + 5):
            text = {4: b"", 7: b"\xff"}.get(number, b"a text")
            content = b"{" if number == 2 else json.dumps({"id": number}).encode()
            members += [(f"{number}.jpg", b"x"), (f"{number}.json", content), (f"{number}.txt", text)]
        write_tar(tmp_path / f"{shard}.tar", members)
    return tmp_path


def opened(folder, dealer, limit=None, most=1.0):
    data = DataConfig(max_bad_fraction=most)
    return Folder.open(task("caption"), SourceConfig("mine", str(folder)), data, dealer, limit, Counts())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_has_the_counts_of_all(folder, ranks):
    def work(dealer):
        found = opened(folder, dealer)
        samples = found.own()

        def write(batch):
            if any(one.key == "8" for one in batch):
                raise DataError("8: broken picture")
            return [one.key for one in batch]

        said = dealer.merge([(samples.number(one), text) for one, text in written(samples, write, samples.bad)])
        found.passed.together(dealer)
        shown = len(str(folder)) + 65
        return said, found.passed.scores(), [line[:shown] for line in found.passed.described()]

    lines = [
        "bad and passed over: 3 of 10 samples",
        f"  0.tar, number 2: malformed text or JSON: {folder}/0.tar: 2: Expecting p",
        f"  1.tar, number 2: malformed text or JSON: {folder}/1.tar: 7: 'utf-8' cod",
        "  1.tar, 8: broken picture",
        "not of this task, of 10 samples: 1 without a caption",
    ]
    counts = {"bad_samples": 3, "other_samples": 1}
    assert Threads(ranks).run(work) == [(["0", "1", "3", "5", "6", "9"], counts, lines)] * ranks


def test_a_limit_counts_all_samples_and_clean_data_adds_no_scores(folder):
    for limit, keys, counts in ((2, ["0", "1"], {}), (4, ["0", "1", "3"], {"bad_samples": 1})):
        found = opened(folder, Dealer(), limit)
        assert [one.key for one in found.own()] == keys == [one.key for one in found.all()]
        assert found.passed.scores() == counts


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_budget_is_that_of_all_ranks(folder, ranks):
    """One bad sample on each of two ranks is within the budget of each, and over that of both."""

    def work(dealer):
        found = opened(folder, dealer, most=0.01)
        try:
            list(found.own())
            found.passed.together(dealer)
        except DataError as error:
            return str(error)

    said = Threads(ranks).run(work)
    assert len(set(said)) == 1
    for part in (f"evaluation, {folder}: 2 of 10 samples are bad", "max_bad_fraction = 0.01", "number 2 of 1.tar",
                 "--max-bad-fraction"):  # fmt: skip
        assert part in said[0]


def test_it_ends_early_only_when_nothing_can_save_it(tmp_path):
    """300 samples allow 3 bad ones, wherever they are; the fourth ends it at once."""
    write_tar(tmp_path / "0.tar", [(f"{number:03d}.txt", b"a") for number in range(300)])
    passed = PassedOver(SourceConfig("s", str(tmp_path)), ShardIndex.load(tmp_path), 0.01, None)
    for number in range(3):
        passed.read()
        passed.bad(number, "broken")
    with pytest.raises(DataError, match=r"the last is number 3 of 0\.tar: broken"):
        passed.bad(3, "broken")
    passed = PassedOver(SourceConfig("s", str(tmp_path)), ShardIndex.load(tmp_path), 1.0, None)
    for number in range(8):
        passed.read()
        passed.bad(number, "broken")
    *_, last = passed.described()
    assert last == "  and 3 more"
