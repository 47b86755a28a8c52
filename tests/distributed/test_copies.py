"""Ranks whose hosts have copies of their own: folders take the place of hosts."""

from __future__ import annotations

import json
import shutil
import socket

import pytest

from data_tools.tokenizer.train import train as train_tokenizer
from tests.distributed.ranks import try_ranks
from tests.support.runs import TRAIN


@pytest.fixture
def hosts(tiny, tmp_path):
    """Two folders with the same data, and a recipe that names them from there."""
    folders = [tmp_path / "host_0", tmp_path / "host_1"]
    for folder in folders:
        shutil.copytree(tiny.data, folder / "data")
    (tmp_path / "recipe.toml").write_text(tiny.recipe.read_text().replace(str(tiny.data), "data"))
    return folders


def train(tiny, hosts, tmp_path, *overrides):
    run = tmp_path / "run"
    arguments = [*tiny.arguments(run, "run.steps=2", "run.evaluate_every=0", *overrides)]
    arguments[arguments.index(str(tiny.recipe))] = str(tmp_path / "recipe.toml")
    return try_ranks(TRAIN, arguments, 2, timeout_seconds=200, folders=hosts)


def refusal(ranks):
    """The one line that all ranks together have to say; each ends with status 2."""
    report = "\n".join(f"{rank.status}\n{rank.out}\n{rank.err}" for rank in ranks)
    errors = [line for rank in ranks for line in rank.err.splitlines() if line.startswith("error")]
    assert [rank.status for rank in ranks] == [2, 2] and len(errors) == 1 and "Traceback" not in report, report
    return errors[0]


def test_equal_copies_train(tiny, hosts, tmp_path):
    ranks = train(tiny, hosts, tmp_path)
    assert [rank.status for rank in ranks] == [0, 0], "\n".join(rank.err[-6000:] for rank in ranks)


def test_another_tokenizer_of_the_same_size(tiny, hosts, tmp_path):
    theirs = hosts[1] / "data" / "tokenizer.model"
    train_tokenizer([tiny.data / "videos_train"], theirs, vocab_size=320)
    message = refusal(train(tiny, hosts, tmp_path))
    assert "tokenizer data/tokenizer.model is another on rank 1" in message
    assert f"on {socket.gethostname()}" in message and "copy it from there" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["images_train", "videos_eval"])
def test_another_manifest(tiny, hosts, tmp_path, source):
    """Of names, counts and sizes that are the same: the content alone differs."""
    manifest = hosts[1] / "data" / source / "index.json"
    table = json.loads(manifest.read_text())
    table["shards"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(table))
    assert f"data/{source} is another on rank 1" in refusal(train(tiny, hosts, tmp_path))


def test_a_copy_that_is_not_there(tiny, hosts, tmp_path):
    """The rank that misses it does not leave the other one waiting."""
    (hosts[1] / "data" / "tokenizer.model").unlink()
    message = refusal(train(tiny, hosts, tmp_path))
    assert "rank 1 on " in message and "data/tokenizer.model: no such file" in message


def test_a_tokenizer_that_one_rank_cannot_use(tiny, hosts, tmp_path):
    (hosts[1] / "data" / "tokenizer.model").write_bytes(b"not a tokenizer")
    message = refusal(train(tiny, hosts, tmp_path))
    assert "rank 1 on " in message and "is not a SentencePiece model" in message
