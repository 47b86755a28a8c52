"""A source's own transformation: what it gets, what it may return; its faults are counted, its changes seen."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.config.source_map import map_sha256
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.error_log import merge_reports
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.source_map import load_map
from dsmoe_vl.errors import CheckpointError, ConfigError, DataError
from tests.support.datasets import photo
from tests.support.loading import loaders, states_of, take, two_sources
from tests.support.tars import write_tar

_MODULE = """
import json

def to_sample(files):
    assert files["__url__"].endswith(".tar")
    if files["cls"] == b"2":
        return None
    return {"png": files["input.png"], "txt": "number " + files["cls"].decode(), "json": {"tasks": ["caption"]}}

def broken(files):
    return files["none"]

def wrong(files):
    return {"txt": 5}

def nothing(files):
    return "text"

def odd_ones(files):
    return files if int(files["__key__"].rsplit("-", 1)[1]) % 2 else None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_shards.py"
    path.write_text(_MODULE)
    yield path
    load_map.cache_clear()
    sys.modules.pop("my_shards", None)


@pytest.fixture
def source(tmp_path):
    """A foreign layout: the picture is KEY.input.png, the text is to be made of KEY.cls."""
    picture = photo(tmp_path / "a.png").read_bytes()
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(
        folder / "a.tar",
        [entry for n in range(3) for entry in ((f"{n:03}.input.png", picture), (f"{n:03}.cls", str(n).encode()))],
    )
    return SourceConfig("own", str(folder))


def samples(source):
    return iterate_samples(source)


def test_files_of_another_layout_become_samples(module, source):
    with pytest.raises(StopIteration):
        stream = samples(replace(source, map="my_shards:to_sample"))
        first, second = next(stream), next(stream)
        with pytest.raises(DataError, match=r"^left out by map: my_shards:to_sample: .*a.tar: 002$"):
            next(stream)
        next(stream)
    for number, sample in enumerate((first, second)):
        found = contents_of(sample)
        assert (sample.key, sample.media_type, found.captions) == (f"00{number}", "png", (f"number {number}",))
        assert found.tasks == ("caption",) and sample.media is not None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", r"^map failed: my_shards:broken: .*a.tar: 000: KeyError: 'none'"),
        ("wrong", r"^map failed: .*: 'txt' is int: return bytes or a text"),
        ("nothing", r"^map failed: .*: it returned str, not a dict or None"),
    ],
)
def test_what_a_function_does_wrong_is_a_bad_sample(module, source, function, message):
    with pytest.raises(DataError, match=message):
        next(samples(replace(source, map=f"my_shards:{function}")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_shards", r'place: map = "my_shards" is not of the form "module:function"'),
        ("my_shard:to_sample", r"there is no module my_shard in .* put my_shard.py there"),
        ("a.b:c", r"there is no module a.b in .* put a/b.py there"),
    ],
)
def test_names_of_no_module(module, name, message):
    with pytest.raises(ConfigError, match=message):
        map_sha256(name, "place")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("my_shards:missing", "", "module my_shards has no function missing"),
        ("my_shards:f", "raise ValueError('a bug')", "cannot be imported: ValueError: a bug"),
        ("my_shards:f", "def f(:", "cannot be imported: SyntaxError"),
    ],
)
def test_a_module_that_does_not_work_is_an_error_of_the_start(module, tmp_path, name, text, message):
    module.write_text(text)
    a, b = two_sources(tmp_path)
    with pytest.raises(ConfigError, match=message):
        loaders((replace(a, map=name), b), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_runs_in_the_workers_and_the_order_stays_exact(module, tmp_path, workers, monkeypatch):
    a, b = two_sources(tmp_path)
    sources = (replace(a, map="my_shards:odd_ones"), b)
    monkeypatch.setattr("dsmoe_vl.data.error_log._MIN_SAMPLES", 10**6)  # half of the source is left out
    world = loaders(sources, 2, workers)
    seen = take(world, 3)
    assert {number % 2 for step in seen for name, _, _, number in step if name == 0} == {1}
    report = merge_reports(loader.report() for loader in world)
    assert report["a/errors/left out by map"] == report["a/errors"] > 10 and report["b/errors"] == 0
    again = loaders(sources, 1)
    for loader in again:
        loader.load_state_dict(states_of(world))
    alone = loaders(sources, 1)
    assert seen + take(again, 2) == take(alone, 5)


def test_another_function_is_another_order(module, tmp_path):
    a, b = two_sources(tmp_path)
    sources = (replace(a, map="my_shards:odd_ones"), b)
    world = loaders(sources, 1)
    state = json.loads(json.dumps(states_of(world)))
    module.write_text(_MODULE + "\n# changed\n")
    (changed,) = loaders(sources, 1)
    with pytest.raises(CheckpointError, match=r"data.sources was .* changes the order of the data"):
        changed.load_state_dict(state)
    (without,) = loaders((a, b), 1)
    with pytest.raises(CheckpointError, match=r"data.sources was"):
        without.load_state_dict(state)
