"""The stream of samples for other trainers: whole epochs, any number of ranks, interruptions, WebDataset's dicts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import webdataset

from dsmoe_vl import SampleStream
from dsmoe_vl.errors import CheckpointError, ConfigError, DataError
from tests.support.loading import COUNTS, DATA, two_sources

TOTAL = sum(COUNTS)


def streams(sources, ranks, **settings):
    return [SampleStream(sources, rank, ranks, 1, replace(DATA, **settings)) for rank in range(ranks)]


def keys(stream, count):
    return [sample["__key__"] for sample in islice(iter(stream), count)]


def test_samples_are_those_of_webdataset(tmp_path):
    a, _ = two_sources(tmp_path)
    urls = [str(path) for path in sorted((tmp_path / "a").glob("*.tar"))]
    theirs = {
        sample["__key__"]: {name: sample[name] for name in ("__url__", "jpg", "txt")}
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    }
    (stream,) = streams([a], 1)
    ours = {sample.pop("__key__"): sample for sample in islice(stream, 2 * TOTAL)}  # lanes are not equally long
    assert ours == theirs


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_an_epoch_has_every_sample_once_over_all_ranks(tmp_path, ranks):
    a, _ = two_sources(tmp_path)
    # As many rounds as every lane has samples of the first epoch: at least TOTAL / lanes - one block.
    seen = Counter(key for stream in streams([a], ranks, shuffle_block=1) for key in keys(stream, 2 * TOTAL // ranks))
    assert len(seen) == TOTAL and max(seen.values()) - min(seen.values()) <= 2
    (alone,) = streams([a], 1, shuffle_block=1)
    assert set(keys(alone, TOTAL)) == set(seen)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interruption_changes_nothing(tmp_path, ranks):
    sources = two_sources(tmp_path)
    whole = [keys(stream, 60) for stream in streams(sources, ranks)]
    first = streams(sources, ranks)
    before = [keys(stream, 25) for stream in first]
    states = json.loads(json.dumps([stream.state_dict() for stream in first]))
    second = streams(sources, ranks)
    for stream in second:
        stream.load_state_dict(states)
    assert [a + keys(stream, 35) for a, stream in zip(before, second, strict=True)] == whole


def test_another_number_of_ranks_sees_the_rest_of_the_epoch_once(tmp_path):
    a, _ = two_sources(tmp_path)
    first = streams([a], 2, shuffle_block=1)
    before = [key for stream in first for key in keys(stream, 40)]
    states = [stream.state_dict() for stream in first]
    second = streams([a], 4, shuffle_block=1)
    for stream in second:
        stream.load_state_dict(states)
    after = [key for stream in second for key in keys(stream, (TOTAL - 80) // 4)]
    assert len(set(before)) == 80 and not set(before) & set(after) and len(set(after)) == len(after)


def test_bad_samples_are_counted_and_too_many_end_it(tmp_path):
    a, b = two_sources(tmp_path)
    with (tmp_path / "a" / "00000.tar").open("r+b") as tar:
        tar.truncate(20_000)
    with pytest.raises(DataError, match="has changed since the manifest"):
        streams([a, b], 1)
    (tmp_path / "a" / "index.json").unlink()
    (stream,) = streams([a, b], 1, max_bad_fraction=0.9)
    keys(stream, 200)
    report = stream.report()
    assert report["a/errors"] == report["a/errors/damaged shard"] > 0 and report["b/errors"] == 0
    (stream,) = streams([a, b], 1, max_bad_fraction=0.0)
    with pytest.raises(DataError, match=r"sources, a: 1 of .* samples are bad"):
        keys(stream, 400)


def test_states_that_do_not_belong_here(tmp_path):
    sources = two_sources(tmp_path)
    first, second = streams(sources, 2)
    with pytest.raises(CheckpointError, match="no lane 1: give those of all ranks"):
        second.load_state_dict([first.state_dict()])
    (other,) = streams(sources[:1], 1)
    with pytest.raises(CheckpointError, match=r"data.sources was"):
        other.load_state_dict([first.state_dict(), second.state_dict()])
    with pytest.raises(ConfigError, match=r"rank 0 of 3: the ranks must divide data.lanes = 8"):
        SampleStream(sources, 0, 3, data=DATA)
    with pytest.raises(ConfigError, match="2 sources: give at least one, and each a name of its own"):
        SampleStream([tmp_path / "a", tmp_path / "a"], data=DATA)
