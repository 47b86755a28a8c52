"""Training with the capacity backend: the same on any split, the same as dropless where nothing is dropped."""

from __future__ import annotations

import json
import shutil

import pytest

from dsmoe_vl.inference.load import load_run
from dsmoe_vl.moe.capacity_feed_forward import CapacityFeedForward
from tests.distributed.ranks import run_ranks
from tests.distributed.test_partition_parity import curve, largest_difference
from tests.support.runs import TRAIN, finish, metrics, python, start
from tests.support.runs import curve as losses


def settings(**changes):
    """`--moe` for the capacity backend."""
    return ("--moe", json.dumps({"backend": "capacity", **changes}))


WIDE = settings(capacity_factor=100.0, eval_capacity_factor=100.0)
NARROW = settings(capacity_factor=0.8, eval_capacity_factor=0.9)


@pytest.mark.parametrize(("world_size", "zero", "ep"), [
    (1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2),
])  # fmt: skip
def test_without_drops_it_trains_like_dropless(world_size, zero, ep, tmp_path):
    """All tasks, in the same micro-steps. Padding, which only dropless computes, is in no loss."""
    flags = ("--accumulation", "2")
    ours = curve(world_size, zero, ep, *flags, *WIDE, "--reload", str(tmp_path / "weights"))
    difference = largest_difference(ours, curve(1, 1, 1, *flags))
    print(f"{world_size} ranks, ZeRO-{zero}, EP {ep}: {difference:.1e}; reloaded {ours['reloaded_difference']:.1e}")
    assert difference < 1e-5 and ours["dropped"] == [0.0] * 4
    assert ours["reloaded_difference"] < 1e-4


@pytest.mark.parametrize(("world_size", "ep", "accumulation"), [(1, 1, "2"), (2, 2, "1")])
def test_the_gradient_cache_with_several_packs_a_micro_step(world_size, ep, accumulation):
    """Its first pass is in evaluation mode, where held-out packs come one at a time, and these do not."""
    flags = ("--accumulation", accumulation, "--gradient-cache", "--steps", "2")
    ours = curve(world_size, 1, ep, *flags, *WIDE)
    assert largest_difference(ours, curve(world_size, 1, ep, *flags)) < 1e-5


@pytest.mark.parametrize(("zero", "ep"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_drops_are_the_same_on_two_ranks(top_k, zero, ep, tmp_path):
    """Micro-steps of one pack a rank, so that the same tokens compete for the same slots. Two steps, because later on
    rounding may turn the choice of some token between experts that it likes alike, and with it who is dropped."""
    flags = ("--caption-only", "--steps", "2", *settings(top_k=top_k, capacity_factor=0.8, eval_capacity_factor=0.9))
    one, two = curve(1, 1, 1, *flags), curve(2, zero, ep, *flags, "--reload", str(tmp_path / "weights"))
    assert largest_difference(two, one) < 1e-5
    assert two["dropped"] == one["dropped"] and min(one["dropped"]) > 0
    assert two["reloaded_difference"] < 1e-4


def test_pyramid_with_residual_branch(tmp_path):
    linear = {"balance_over": "task", "local_entropy_weight": 0.01, "bias_rate": 0.01}
    flags = ("--caption-only", *settings(experts_per_layer=[2, 4], residual=True, **linear))
    one, two = curve(1, 1, 1, *flags), curve(2, 2, 2, *flags, "--reload", str(tmp_path / "weights"))
    assert largest_difference(two, one) < 1e-5 and two["reloaded_difference"] < 1e-4
    assert one["terms"][-1]["loss"] < one["terms"][0]["loss"]


def test_dropless_pyramid(tmp_path):
    flags = ("--accumulation", "2", "--all-terms")
    pyramid = {"experts_per_layer": [2, 4]}
    dropless = ("--moe", json.dumps(pyramid), "--reload", str(tmp_path / "weights"))
    two, one = curve(2, 2, 2, *flags, *dropless), curve(1, 1, 1, *flags, "--moe", json.dumps(pyramid))
    assert largest_difference(two, one) < 1e-5 and two["reloaded_difference"] < 1e-4
    wide = settings(capacity_factor=100.0, eval_capacity_factor=100.0, **pyramid)
    assert largest_difference(curve(2, 2, 2, *flags, *wide), one) < 1e-5


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("more", [
    NARROW, settings(drop_tokens=False), settings(top_k=1, random_token_selection=True, noisy_gate="RSample"),
    settings(noisy_gate="Jitter"),
], ids=str)  # fmt: skip
def test_text_alone_beside_videos_alone_does_not_hang(more, zero):
    result = curve(2, zero, 2, "--one-sided", "--steps", "2", *more)
    assert len(result["terms"]) == 2


def test_buffers_as_large_as_needed_are_dropless():
    flags = ("--accumulation", "2")
    ours = curve(2, 2, 2, *flags, *settings(drop_tokens=False))
    assert largest_difference(ours, curve(1, 1, 1, *flags)) < 1e-5 and sum(ours["dropped"]) == 0


@pytest.mark.parametrize(
    "more", [NARROW, settings(top_k=1, random_token_selection=True, noisy_gate="RSample")], ids=str
)
def test_recomputing_changes_nothing(more):
    """The backward recomputes the same choices, noise included."""
    flags = ("--caption-only", *more)
    assert largest_difference(curve(2, 2, 2, *flags, "--recompute", "moe"), curve(2, 2, 2, *flags)) < 1e-5


def test_bf16_learns_like_fp32():
    flags = ("--caption-only", "--steps", "10", *NARROW)
    rounded, exact = curve(2, 2, 2, *flags, "--bf16"), curve(2, 2, 2, *flags)
    for ours, theirs in zip(rounded["terms"], exact["terms"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)


def test_a_noisy_run_resumes_bit_for_bit_and_can_be_used(tiny):
    run = tiny.folder / "runs" / "capacity"
    keys = (
        "backend=capacity",
        "capacity_factor=1.0",
        "top_k=1",
        "random_token_selection=true",
        "noisy_gate=RSample",
        "residual=true",
    )
    overrides = ("run.steps=8", "run.checkpoint_every=4", *(f"moe.{key}" for key in keys))
    run_ranks(TRAIN, tiny.arguments(run, *overrides), world_size=2)
    whole = losses(run)
    assert any(line["drop_fraction"] > 0 for line in metrics(run) if "drop_fraction" in line)
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    assert "resumed at step 4" in run_ranks(TRAIN, tiny.arguments(run, *overrides), world_size=2)
    assert losses(run) == whole
    layer = load_run(run).model.layers[1].feed_forward
    assert isinstance(layer, CapacityFeedForward) and layer.mlp is not None
    result = finish(start(python(TRAIN.with_name("evaluate.py"), "--run", run, "--max-tokens", 4)))
    assert result.status == 0, result.err
