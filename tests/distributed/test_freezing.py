"""Frozen parts on one rank and two, at every ZeRO stage, with expert parallelism: what moves is what the plan says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_vl.checkpoint.optimizer_files import OptimizerFiles
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.recipe import PartConfig
from dsmoe_vl.planner.trained import rules
from tests.distributed.ranks import WarmRanks
from tests.distributed.train_losses import LEARNING_RATE, RECIPE

SCRIPT = Path(__file__).with_name("train_losses.py")
FREEZE, THAW = {"freeze": True}, {"freeze": False}
SETS = {
    "vision and all experts": {"vision": FREEZE, "experts": FREEZE, "layers.0.*": FREEZE},
    "some experts": {"layers.1.*": FREEZE, "embedding": FREEZE, "connector": FREEZE, "heads": {"lr_scale": 0.25}},
    "all but the connector": {"*": FREEZE, "connector": THAW},
}
TOPOLOGIES = [(2, 2, 0), (2, 1, 1), (2, 2, 2), (2, 1, 3), (2, 2, 3)]
USED = ("--contrast", "sigmoid")  # the only one that uses every parameter of the heads
CAPACITY = {"backend": "capacity", "drop_tokens": False, "residual": True}


@pytest.fixture(scope="module")
def ranks():
    warm = {count: WarmRanks(SCRIPT, count) for count in (1, 2)}
    yield warm
    for of_count in warm.values():
        of_count.close()


def train(ranks, topology, tables, *more):
    count, ep_size, stage = topology
    fixed = ["--zero", stage, "--ep", ep_size, "--accumulation", 2, "--train", json.dumps(tables), *USED, *more]
    return ranks[count].ask([str(word) for word in fixed])


def expected(tables, moe=None):
    """The names that train, by the plan's own rules."""

    train = {key: PartConfig(**table) for key, table in tables.items()}
    found = rules(replace(RECIPE, train=train, moe=replace(RECIPE.moe, **(moe or {}))))
    return {name for name, rule in found.items() if not rule.freeze}


def moved(first, second):
    """The parameters that differ between two checkpoints; experts as one name."""
    before, after = (WeightsFile(Path(folder)).load() for folder in (first, second))
    return {name for name in before if "selection_bias" not in name and not before[name].equal(after[name])} - {
        "head.weight"  # the embedding
    }


@pytest.mark.parametrize("tables", SETS.values(), ids=SETS)
def test_what_the_plan_says_moves_and_nothing_else(ranks, tables, tmp_path):
    one = train(ranks, (1, 1, 0), tables, "--steps", 2)
    for number, topology in enumerate(TOPOLOGIES):
        begin = train(ranks, topology, tables, "--steps", 0, "--save", tmp_path / f"{number}_begin")["saved"]
        found = train(ranks, topology, tables, "--steps", 2, "--save", tmp_path / f"{number}_end")
        assert moved(begin, found["saved"]) == expected(tables), topology
        assert OptimizerFiles(Path(found["saved"])).updates == dict.fromkeys(expected(tables), 2)
        for ours, theirs in zip(found["terms"], one["terms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), topology
        assert found["through_vision"] == any(name.startswith("vision.") for name in expected(tables))
        assert found["norms"] == pytest.approx(one["norms"], rel=1e-5)


@pytest.mark.parametrize("tables", list(SETS.values())[:2], ids=list(SETS)[:2])
def test_expert_capacity(ranks, tables, tmp_path):
    capacity = ["--moe", json.dumps(CAPACITY)]
    one = train(ranks, (1, 1, 0), tables, "--steps", 2, *capacity)
    for stage in (0, 1, 2):
        run = tmp_path / str(stage)
        begin = train(ranks, (2, 2, stage), tables, "--steps", 0, "--save", f"{run}_0", *capacity)["saved"]
        found = train(ranks, (2, 2, stage), tables, "--steps", 2, "--save", f"{run}_2", *capacity)
        assert moved(begin, found["saved"]) == expected(tables, CAPACITY), stage
        for ours, theirs in zip(found["terms"], one["terms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), stage


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_moves_nothing_that_is_frozen(ranks, stage, tmp_path):
    tables = SETS["vision and all experts"]
    begin = train(ranks, (2, 2, stage), tables, "--bf16", "--steps", 0, "--save", tmp_path / "begin")["saved"]
    found = train(ranks, (2, 2, stage), tables, "--bf16", "--steps", 2, "--save", tmp_path / "end")
    assert moved(begin, found["saved"]) <= expected(tables)  # a norm of 1 may round to itself
    assert len(moved(begin, found["saved"])) > 0.6 * len(expected(tables))
    assert OptimizerFiles(Path(found["saved"])).updates.keys() == expected(tables)


@pytest.mark.parametrize("chain", [[(2, 2, 2), (1, 1, 0), (2, 1, 3), (2, 2, 0)], [(2, 2, 3), (2, 1, 1), (1, 1, 3)]])
def test_a_run_with_frozen_parts_goes_through_topologies(ranks, chain, tmp_path):
    tables, terms, resume = SETS["some experts"], [], ()
    for topology in chain:
        found = train(ranks, topology, tables, "--steps", 1, "--save", tmp_path / "run", *resume)
        terms += found["terms"]
        resume = ("--resume", found["saved"])
    whole = train(ranks, chain[0], tables, "--steps", len(chain))
    for ours, theirs in zip(terms, whole["terms"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_what_is_no_longer_frozen_begins_anew_on_any_topology(ranks, tmp_path):
    """Its first update is as long as any first update of Adam's: its moments do not count the steps before."""
    frozen, thawed = SETS["vision and all experts"], {"heads": FREEZE}
    first = train(ranks, (2, 2, 2), frozen, "--steps", 2, "--save", tmp_path / "first")["saved"]
    ends = []
    for number, topology in enumerate([(2, 2, 2), (1, 1, 0), (2, 1, 3)]):
        run = tmp_path / str(number)
        one = train(ranks, topology, thawed, "--steps", 1, "--resume", first, "--save", f"{run}_1")["saved"]
        assert moved(first, one) == expected(thawed)
        updates = OptimizerFiles(Path(one)).updates
        assert updates == {name: 3 if name in expected(frozen) else 1 for name in expected(thawed)}
        before, after = (WeightsFile(Path(folder)).load() for folder in (first, one))
        for name in ("vision.layers.0.attention.qkv.weight", "layers.1.feed_forward.experts.w1"):
            length = (after[name] - before[name]).abs().median()
            assert length == pytest.approx(LEARNING_RATE, rel=0.05)
        ends.append(train(ranks, topology, thawed, "--steps", 2, "--resume", one)["terms"])
    for terms in ends[1:]:
        for ours, theirs in zip(terms, ends[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_frozen_values_keep_the_bits_of_their_precision(ranks, tmp_path):
    tables = SETS["some experts"]

    def go(topology, steps, of, name, *resume):
        fixed = ("--bf16", "--steps", steps, "--save", tmp_path / name)
        return train(ranks, topology, of, *fixed, *resume)["saved"]

    first = go((2, 2, 2), 1, {}, "first")
    second = go((2, 2, 3), 1, tables, "second", "--resume", first)
    third = go((2, 1, 0), 1, tables, "third", "--resume", second)
    assert moved(first, second) <= expected(tables) and moved(second, third) <= expected(tables)
    assert moved(third, go((1, 1, 1), 0, {}, "thawed", "--resume", third)) == set()
