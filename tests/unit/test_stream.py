import json
from collections import Counter
from pathlib import Path

import pytest

from dsmoe_vl.data.error_log import BadSample, ErrorLog, ReadReport
from dsmoe_vl.data.shards.index import Shard, ShardIndex
from dsmoe_vl.data.stream import Lane, SampleRef, SourceOrder
from dsmoe_vl.errors import DataError


def index(*counts: int) -> ShardIndex:
    return ShardIndex(Path(), "train", tuple(Shard(f"{i}.tar", count, 0, "") for i, count in enumerate(counts)))


def lanes_of(indexes: list[ShardIndex], lanes: int, weights: list[float], block: int = 16, seed: int = 1) -> list[Lane]:
    orders = [SourceOrder(f"source{i}", source, lanes, block, seed) for i, source in enumerate(indexes)]
    return [Lane(lane, lanes, orders, weights) for lane in range(lanes)]


@pytest.mark.parametrize(
    ("counts", "lanes", "block"),
    [((100,), 4, 8), ((33, 1, 0, 70), 4, 16), ((5, 2), 8, 16), ((1,), 4, 256), ((64,), 64, 256), ((257,), 1, 256)],
)
def test_every_sample_once_an_epoch(counts: tuple[int, ...], lanes: int, block: int) -> None:
    everything = {(shard, sample) for shard, count in enumerate(counts) for sample in range(count)}
    drawn: dict[int, Counter[tuple[int, int]]] = {}
    for lane in lanes_of([index(*counts)], lanes, [1.0], block):
        while (ref := lane.next()).epoch < 3:
            drawn.setdefault(ref.epoch, Counter())[ref.shard, ref.sample] += 1
    assert {epoch: set(counter) for epoch, counter in drawn.items()} == dict.fromkeys(range(3), everything)
    assert {count for counter in drawn.values() for count in counter.values()} == {1}


def test_no_lane_starves_in_a_small_source() -> None:
    for samples in (1, 7, 63, 65):
        for lane in lanes_of([index(samples)], 64, [1.0]):
            assert lane.next().epoch <= 64 // samples


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def draw(seed: int) -> list[SampleRef]:
        lane = lanes_of([index(40, 60), index(30)], 2, [2.0, 1.0], seed=seed)[1]
        return [lane.next() for _ in range(300)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    first = [ref[2:] for ref in draw(1) if (ref.source, ref.epoch) == (0, 0)]
    second = [ref[2:] for ref in draw(1) if (ref.source, ref.epoch) == (0, 1)]
    assert first != second != sorted(second)


def test_blocks_are_near_each_other() -> None:
    lane = lanes_of([index(1000, 1000)], 2, [1.0], block=50)[0]
    for _ in range(10):
        block = [lane.next() for _ in range(50)]
        assert len({ref.shard for ref in block}) == 1
        assert max(ref.sample for ref in block) - min(ref.sample for ref in block) == 49


def test_mixture_follows_the_weights() -> None:
    lanes = lanes_of([index(100), index(50), index(1000)], 4, [6.0, 3.0, 1.0])
    for lane in lanes:
        drawn = Counter(lane.next().source for _ in range(1000))
        assert drawn == {0: pytest.approx(600, abs=2), 1: pytest.approx(300, abs=2), 2: pytest.approx(100, abs=2)}
    rare = [next(i for i in range(100) if lane.next().source == 2) for lane in lanes_of([index(9)] * 3, 4, [6, 3, 1])]
    assert len(set(rare)) > 1  # lanes do not draw it at the same time


def test_a_block_that_begins_announces_the_shard_of_the_next_one() -> None:
    announced: list[tuple[int, int]] = []
    orders = [SourceOrder("a", index(40, 60, 30), 2, 10, 1), SourceOrder("b", index(25, 25), 2, 10, 1)]
    lane = Lane(1, 2, orders, [2.0, 1.0], lambda source, shard: announced.append((source, shard)))
    begun: list[tuple[int, int]] = []
    for _ in range(300):
        count = len(announced)
        ref = lane.next()
        if len(announced) > count:
            begun.append((ref.source, ref.shard))
    for source in (0, 1):
        shards = [shard for own, shard in begun if own == source]
        assert shards[1:] == [shard for own, shard in announced if own == source][:-1]
        assert len(shards) > 5


@pytest.mark.parametrize("stop", [0, 1, 15, 16, 17, 200])
def test_state_continues_anywhere(stop: int) -> None:
    first, second = (lanes_of([index(40, 60), index(3)], 4, [3.0, 1.0])[2] for _ in range(2))
    for _ in range(stop):
        first.next()
    second.restore(json.loads(json.dumps(first.state())))
    assert [first.next() for _ in range(100)] == [second.next() for _ in range(100)]
    assert len(json.dumps(first.state())) < 200


def test_changed_weights_hold_from_the_restored_sample_on() -> None:
    before = lanes_of([index(500), index(500)], 4, [3.0, 1.0])[2]
    for _ in range(4000):
        before.next()
    changed = lanes_of([index(500), index(500)], 4, [1.0, 1.0])[2]
    changed.restore(json.loads(json.dumps(before.state())))
    assert Counter(changed.next().source for _ in range(20))[0] == pytest.approx(10, abs=1)
    again = lanes_of([index(500), index(500)], 4, [1.0, 1.0])[2]
    again.restore(json.loads(json.dumps(changed.state())))
    assert [again.next() for _ in range(100)] == [changed.next() for _ in range(100)]


def bad(reason: str = "image cannot be decoded: no JPEG", source: str = "photos") -> BadSample:
    return BadSample(source, "00000.tar", 7, 0, reason)


def test_error_budget_is_per_source() -> None:
    log = ErrorLog(0.05)
    for _ in range(5):
        log.bad(bad())
    log.bad(bad(source="videos"))
    with pytest.raises(
        DataError, match=r"^data\.sources, photos: 6 of 6 samples are bad, .*max_bad_fraction = 0\.05"
    ) as error:
        log.bad(bad())
    assert "number 7 of 00000.tar: image cannot be decoded: no JPEG" in str(error.value)


def test_error_budget_grows_with_what_is_read() -> None:
    log = ErrorLog(0.01)
    for _ in range(20):
        for _ in range(100):
            log.good("photos", epoch=0)
        log.bad(bad())
    with pytest.raises(DataError):
        for _ in range(3):
            log.bad(bad())


def test_no_tolerance_and_boundless_tolerance() -> None:
    with pytest.raises(DataError):
        ErrorLog(0.0).bad(bad())
    log = ErrorLog(1.0)
    with pytest.raises(DataError, match="100 of 100"):  # nothing can be read at all
        for _ in range(1000):
            log.bad(bad())


def test_report_and_quarantine(tmp_path: Path) -> None:
    log, report = ErrorLog(0.5), ReadReport(tmp_path / "quarantine.jsonl")
    log.good("photos", epoch=3)
    log.bad(bad())
    report.add(log.drain())
    log.bad(bad("longer than pack: k has 9 tokens"))
    report.add(log.drain())
    report.add(log.drain())
    assert report.values() == {
        "photos/epoch": 3,
        "photos/samples": 3,
        "photos/errors": 2,
        "photos/errors/image cannot be decoded": 1,
        "photos/errors/longer than pack": 1,
    }
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == [
        "image cannot be decoded: no JPEG",
        "longer than pack: k has 9 tokens",
    ]
    assert lines[0] == {
        "source": "photos",
        "shard": "00000.tar",
        "sample": 7,
        "epoch": 0,
        "reason": bad().reason,
        "key": "",
    }
