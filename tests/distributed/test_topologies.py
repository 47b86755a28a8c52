"""A checkpoint continues on any other number of ranks, expert parallelism, ZeRO stage and precision."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsmoe_vl.checkpoint.optimizer_files import OptimizerFiles
from dsmoe_vl.checkpoint.optimizer_state import MASTER, MOMENTS, Range
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from tests.distributed.ranks import WarmRanks

SCRIPT = Path(__file__).with_name("train_losses.py")
# Ranks, expert parallelism, ZeRO stage: a run goes from each to the next.
CHAIN = [
    (2, 2, 2), (2, 1, 0), (2, 2, 3), (2, 1, 1), (2, 2, 0), (2, 1, 3), (2, 2, 1),
    (1, 1, 0), (1, 1, 3), (1, 1, 1), (1, 1, 2), (2, 2, 3), (2, 1, 2),
]  # fmt: skip
CAPACITY = ["--moe", '{"backend": "capacity", "capacity_factor": 8.0}']
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def ranks():
    """Warm ranks by their number."""
    warm = {count: WarmRanks(SCRIPT, count) for count in (1, 2)}
    yield warm
    for of_count in warm.values():
        of_count.close()


def train(ranks, topology, *more):
    count, ep_size, stage = topology
    return ranks[count].ask(["--zero", str(stage), "--ep", str(ep_size), "--accumulation", "2", *map(str, more)])


def chained(ranks, chain, run, *more, steps=2):
    """Terms and norms of a run that changes its topology every `steps` steps."""
    terms, norms, resume = [], [], ()
    for topology in chain:
        found = train(ranks, topology, "--steps", steps, "--save", run, *resume, *more)
        terms += found["terms"]
        norms += found["norms"]
        resume = ("--resume", found["saved"])
    return terms, norms


def same(ours, theirs):
    terms, norms = ours
    assert len(terms) == len(theirs["terms"])
    for changed, whole in zip(terms, theirs["terms"], strict=True):
        assert changed == pytest.approx(whole, rel=RELATIVE, abs=RELATIVE)
    known = [(a, b) for a, b in zip(norms, theirs["norms"], strict=True) if a == a]  # ZeRO-0 says none
    assert [a for a, _ in known] == pytest.approx([b for _, b in known], rel=RELATIVE)


def test_a_run_that_changes_its_topology_again_and_again_takes_the_same_steps(ranks, tmp_path):
    ours = chained(ranks, CHAIN, tmp_path / "run", "--caption-only")
    same(ours, train(ranks, CHAIN[0], "--steps", 2 * len(CHAIN), "--caption-only"))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_steps_after_every_change_of_the_chain(ranks, tmp_path):
    """With the same data, as many steps on the topology that wrote the checkpoint and on the next one."""
    saved = train(ranks, CHAIN[0], "--steps", 3, "--save", tmp_path / "0", "--caption-only")["saved"]
    for number, (before, after) in enumerate(pairwise(CHAIN), start=1):
        resume = ("--resume", saved, "--caption-only")
        stayed = train(ranks, before, "--steps", 20, *resume)
        changed = train(ranks, after, "--steps", 20, *resume)
        same((changed["terms"], changed["norms"]), stayed)
        saved = train(ranks, after, "--steps", 3, "--save", tmp_path / str(number), *resume)["saved"]


def test_with_every_term(ranks, tmp_path):
    """Fewer steps: a rounding error that lets a token choose another expert is one no more."""
    chain = CHAIN[5:11]
    ours = chained(ranks, chain, tmp_path / "run", "--all-terms", steps=1)
    same(ours, train(ranks, chain[0], "--steps", len(chain), "--all-terms"))


def test_with_an_update_in_many_parts(ranks, tmp_path):
    """ZeRO-3 updates one sub-group of the parameters after the other."""
    chain = [(2, 2, 3), (1, 1, 3), (2, 2, 2), (2, 1, 3)]
    ours = chained(ranks, chain, tmp_path / "run", "--caption-only", "--sub-group", 2000)
    same(ours, train(ranks, (2, 2, 2), "--steps", 2 * len(chain), "--caption-only"))


def test_with_expert_capacity(ranks, tmp_path):
    chain = [(2, 2, 2), (1, 1, 0), (2, 1, 1), (2, 2, 0)]
    ours = chained(ranks, chain, tmp_path / "run", *CAPACITY)
    same(ours, train(ranks, chain[0], "--steps", 2 * len(chain), *CAPACITY))


def state(checkpoint):
    """Every fp32 weight and moment in a checkpoint, flattened, by kind and tensor."""
    files, found = OptimizerFiles(checkpoint), {}
    for name, shape in WeightsFile(checkpoint).shapes().items():
        if "selection_bias" not in name:
            views = {kind: torch.zeros(math.prod(shape)) for kind in (MASTER, *MOMENTS)}
            files.fill(Range(name, 0, math.prod(shape), views, None))
            found |= {(name, kind): value for kind, value in views.items()}
    return found


def test_nothing_is_rounded_on_the_way_through_other_precisions(ranks, tmp_path):
    """Read and written again without a step: the same bits."""
    first = train(ranks, (2, 2, 2), "--bf16", "--steps", 2, "--save", tmp_path / "first")["saved"]
    whole, last = state(Path(first)), first
    assert any(not value.equal(value.bfloat16().float()) for (_, kind), value in whole.items() if kind == MASTER)
    chain = [((1, 1, 3), ()), ((2, 1, 0), ("--bf16",)), ((1, 1, 1), ()), ((2, 2, 3), ("--bf16",)), ((2, 2, 0), ())]
    for number, (topology, precision) in enumerate(chain):
        run = tmp_path / str(number)
        last = train(ranks, topology, "--steps", 0, "--resume", last, "--save", run, *precision)["saved"]
        now = state(Path(last))
        assert now.keys() == whole.keys()
        assert [key for key in whole if not now[key].equal(whole[key])] == [], topology
