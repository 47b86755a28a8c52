"""Adapters on one rank and two, at every ZeRO stage, with expert parallelism: what moves, and the same losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_vl.checkpoint.optimizer_files import OptimizerFiles
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.recipe import LoraConfig
from dsmoe_vl.planner.trained import rules
from tests.distributed.ranks import WarmRanks
from tests.distributed.test_freezing import CAPACITY, SCRIPT, USED, moved
from tests.distributed.train_losses import RECIPE

LORA = {"rank": 4, "parts": ["vision", "attention", "feed_forward", "experts"]}
TOPOLOGIES = {"dropless": [(2, 2, 0), (2, 1, 1), (2, 2, 2), (2, 2, 3)], "capacity": [(2, 2, 0), (2, 2, 2)]}


@pytest.fixture(scope="module")
def ranks():
    warm = {count: WarmRanks(SCRIPT, count) for count in (1, 2)}
    yield warm
    for of_count in warm.values():
        of_count.close()


def train(ranks, topology, *more):
    count, ep_size, stage = topology
    fixed = ["--zero", stage, "--ep", ep_size, "--accumulation", 2, "--train", "{}", "--lora", json.dumps(LORA), *USED]
    return ranks[count].ask([str(word) for word in [*fixed, *more]])


def expected(moe):
    """The names that train, by the plan's own rules."""
    lora = LoraConfig(LORA["rank"], parts=tuple(LORA["parts"]))
    recipe = replace(RECIPE, train={}, lora=lora, moe=replace(RECIPE.moe, **moe))
    return {name for name, rule in rules(recipe).items() if not rule.freeze}


def same(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", TOPOLOGIES)
def test_adapters_train_and_what_they_adapt_does_not(ranks, backend, tmp_path):
    moe = CAPACITY if backend == "capacity" else {}
    more = ["--moe", json.dumps(moe)]
    one = train(ranks, (1, 1, 0), "--steps", 2, *more)
    begin = train(ranks, (2, 2, 2), "--steps", 0, "--save", tmp_path / "begin", *more)["saved"]
    for number, topology in enumerate(TOPOLOGIES[backend]):
        found = train(ranks, topology, "--steps", 2, "--save", tmp_path / str(number), *more)
        same(found["terms"], one["terms"])
        assert found["norms"] == pytest.approx(one["norms"], rel=1e-5), topology
        assert moved(begin, found["saved"]) == expected(moe), topology
        assert OptimizerFiles(Path(found["saved"])).updates == dict.fromkeys(expected(moe), 2)


def test_a_run_continues_bit_for_bit_and_on_other_topologies(ranks, tmp_path):
    whole = train(ranks, (2, 2, 2), "--steps", 3, "--save", tmp_path / "whole")
    first = train(ranks, (2, 2, 2), "--steps", 1, "--save", tmp_path / "first")
    second = train(ranks, (2, 2, 2), "--steps", 2, "--resume", first["saved"], "--save", tmp_path / "second")
    assert first["terms"] + second["terms"] == whole["terms"]
    assert moved(whole["saved"], second["saved"]) == set()
    assert "layers.1.feed_forward.experts.3.w1_lora_b" in WeightsFile(Path(first["saved"])).places
    for topology in ((1, 1, 0), (2, 1, 3)):
        found = train(ranks, topology, "--steps", 2, "--resume", first["saved"])
        same(found["terms"], whole["terms"][1:])


def test_bf16_and_the_one_process_model_with_the_same_weights(ranks, tmp_path):
    begin = train(ranks, (2, 2, 3), "--bf16", "--steps", 0, "--save", tmp_path / "begin")["saved"]
    end = train(ranks, (2, 2, 3), "--bf16", "--steps", 2, "--save", tmp_path / "end")["saved"]
    assert any("lora_b" in name for name in moved(begin, end)) and moved(begin, end) <= expected({})
    found = train(ranks, (2, 2, 3), "--steps", 1, "--reload", tmp_path / "weights")
    assert found["reloaded_difference"] < 1e-5
