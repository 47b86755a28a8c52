"""The same steps on one rank and on two: the same value of every term, the same gradient norms."""

from __future__ import annotations

import atexit
import functools
from pathlib import Path

import pytest

from tests.distributed.ranks import WarmRanks

SCRIPT = Path(__file__).with_name("train_losses.py")


@functools.cache
def ranks(world_size):
    """Ranks that stay to the end of the tests."""
    warm = WarmRanks(SCRIPT, world_size)
    atexit.register(warm.close)
    return warm


@functools.cache
def curve(world_size, zero, ep, *flags):
    """Terms and gradient norms of a few steps; see train_losses.py for the flags."""
    return ranks(world_size).ask(["--zero", str(zero), "--ep", str(ep), *flags])


def largest_difference(a, b):
    """Relative, over all steps, terms and gradient norms; of numbers around zero, relative to 0.01."""
    pairs = list(zip(a["norms"], b["norms"], strict=True))
    for ours, theirs in zip(a["terms"], b["terms"], strict=True):
        assert ours.keys() == theirs.keys()
        pairs += [(ours[name], theirs[name]) for name in ours]
    return max(abs(x - y) / max(abs(y), 1e-2) for x, y in pairs)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ep", [1, 2])
def test_twenty_steps_of_captioning(zero, ep):
    flags = ("--caption-only", "--steps", "20")
    difference = largest_difference(curve(2, zero, ep, *flags), curve(1, 1, 1, *flags))
    print(f"ZeRO-{zero} EP {ep}: largest relative difference {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ep", [1, 2])
def test_four_steps_of_all_tasks(zero, ep):
    """The same micro-steps, so that terms that couple samples are the same too."""
    flags = ("--accumulation", "2")
    difference = largest_difference(curve(2, zero, ep, *flags), curve(1, 1, 1, *flags))
    print(f"ZeRO-{zero} EP {ep}: largest relative difference {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize(
    "flags",
    [
        "--all-terms",
        "--routing plain",
        "--routing task",
        "--routing isolated",
        "--contrast sigmoid",
        "--gradient-cache",
        "--task-weights uncertainty",
        "--task-weights famo",
        "--hears",
    ],
)
def test_every_choice_is_the_same_on_two_ranks(flags):
    flags = (*flags.split(), "--accumulation", "2", "--steps", "3")
    difference = largest_difference(curve(2, 2, 2, *flags), curve(1, 1, 1, *flags))
    print(f"{flags}: largest relative difference {difference:.1e}")
    assert difference < 1e-5


def test_a_speech_encoder_is_the_same_in_partitions():
    flags = ("--hears", "--accumulation", "2", "--steps", "3")
    assert largest_difference(curve(2, 3, 1, *flags), curve(1, 1, 1, *flags)) < 1e-5


@pytest.mark.parametrize("zero", [2, 3])
def test_models_of_other_makers_are_the_same_on_two_ranks(zero):
    flags = ("--as-others", "--accumulation", "2", "--steps", "3")
    assert largest_difference(curve(2, zero, 2, *flags), curve(1, 1, 1, *flags)) < 1e-5


def test_the_gradient_cache_contrasts_over_accumulation():
    whole = curve(1, 1, 1, "--accumulation", "1")
    cached = curve(2, 2, 2, "--accumulation", "2", "--gradient-cache")
    assert largest_difference(cached, whole) < 1e-5
    assert largest_difference(curve(1, 1, 1, "--accumulation", "2"), whole) > 1e-3  # the test can tell


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_text_alone_beside_videos_alone_does_not_hang(zero):
    for flags in [(), ("--contrast", "sigmoid", "--all-terms"), ("--gradient-cache",), ("--hears",)]:
        result = curve(2, zero, 2, "--one-sided", "--steps", "2", *flags)
        assert len(result["terms"]) == 2


@pytest.mark.parametrize("what", ["moe", "decoder", "all"])
def test_recomputing_changes_nothing(what):
    flags = ("--accumulation", "2")
    assert largest_difference(curve(2, 2, 2, "--recompute", what, *flags), curve(1, 1, 1, *flags)) < 1e-5


def test_partitions_in_fp32_are_their_own_masters():
    flags = ("--accumulation", "2")
    assert all(curve(2, 3, 2, *flags)["shares_masters"])
    assert not any(curve(2, 3, 2, "--bf16", *flags, "--steps", "20")["shares_masters"])


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_learns_like_fp32(zero):
    """bf16 rounds to 3 digits: the losses of twenty steps stay within a few percent of the fp32 curve."""
    flags = ("--accumulation", "2", "--steps", "20")
    rounded, exact = curve(2, zero, 2, "--bf16", *flags), curve(1, 1, 1, *flags)
    for ours, theirs in zip(rounded["terms"], exact["terms"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)
