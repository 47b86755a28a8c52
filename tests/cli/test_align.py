"""`launch/align.py`, and a run that starts from what it writes."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dsmoe_vl.checkpoint.store import newest_complete
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from tests.support.imports import import_speaking, with_its_tokenizer
from tests.support.runs import REPOSITORY, TRAIN, finish, python, start

pytest.importorskip("transformers", reason="transformers: aligning imported weights was not checked")

ALIGN = REPOSITORY / "launch" / "align.py"
RETRIEVAL = (
    "tasks.retrieval.weight=1", "tasks.retrieval.embedding_width=16", "tasks.retrieval.pooling=mean",
    "tasks.caption.weight=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    return import_speaking(tmp_path_factory.mktemp("speaking"))


def test_a_run_starts_from_aligned_states(tiny, speaking, tmp_path):
    """Measured, trained and evaluated; the matrices are those that were measured, before and after."""
    recipe, output = with_its_tokenizer(tiny, speaking, tmp_path / "r.toml"), tmp_path / "aligned"
    command = python(ALIGN, "--recipe", recipe, "--output", output, "--pairs", "40", *RETRIEVAL)
    result = finish(start(command, cold=True))
    assert result.status == 0, result.out + result.err
    assert re.search(r"aligned by (\d+) pairs, with shrinkages [\d.]+ and [\d.]+ of media and text states", result.out)
    measured = WeightsFile(output).load()
    assert measured["retrieval.media.alignment.weight"].shape == (16, 48) and "connector.up.weight" in measured
    assert json.loads((output / "model.json").read_text())["tasks"]["retrieval"]["align"] is True
    run = tmp_path / "run"
    recipe.write_text(recipe.read_text().replace(str(speaking), str(output)))
    arguments = ["--deepspeed", tiny.deepspeed(2), "--recipe", recipe, "--run-dir", run, "run.steps=6", *RETRIEVAL]
    result = finish(start(python(TRAIN, *arguments, "data.workers=1")))
    assert result.status == 0, result.out + result.err
    found = newest_complete(run / "checkpoints")
    assert found is not None
    trained = WeightsFile(found[0]).load()
    for name, value in measured.items():
        assert (".alignment." not in name) or torch.equal(trained[name], value), name
    assert not torch.equal(trained["connector.up.weight"], measured["connector.up.weight"])
    assert finish(start(python(REPOSITORY / "launch" / "evaluate.py", "--run", run))).status == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("tasks.retrieval.embedding_width=49",), ("embedding_width = 49", "48 directions")),
        (("--pairs", "31"), ("--pairs 31", "at least 32")),
        (("tasks.retrieval.weight=0", "tasks.caption.weight=1"), ("tasks.retrieval.weight",)),
        (('model.init_from=""', "tokenizer.path=x", "tokenizer.vocab_size=400"), ("model.init_from",)),
    ],
)
def test_what_cannot_be_aligned(tiny, speaking, tmp_path, options, words):
    recipe, output = with_its_tokenizer(tiny, speaking, tmp_path / "r.toml"), tmp_path / "aligned"
    result = finish(start(python(ALIGN, "--recipe", recipe, "--output", output, *RETRIEVAL, *options)))
    assert result.status == 2 and all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err and not output.exists()


def test_an_alignment_that_was_not_measured(tiny, speaking, tmp_path):
    recipe = with_its_tokenizer(tiny, speaking, tmp_path / "r.toml")
    arguments = ["--deepspeed", tiny.deepspeed(2), "--recipe", recipe, "--run-dir", tmp_path / "run", *RETRIEVAL]
    result = finish(start(python(TRAIN, *arguments, "tasks.retrieval.align=true")))
    assert result.status == 2 and "launch/align.py" in result.err and "Traceback" not in result.err
