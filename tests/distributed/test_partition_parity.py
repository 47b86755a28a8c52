"""The same twenty steps on one rank and on two, for every ZeRO stage and EP size: the same losses, the same norms."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("train_losses.py")


@functools.cache
def curve(world_size, zero, ep, *flags):
    output = run_ranks(SCRIPT, ["--zero", str(zero), "--ep", str(ep), *flags], world_size)
    return json.loads(output.strip().splitlines()[-1])


def largest_difference(a, b):
    pairs = [(x, y) for p, q in zip(a["losses"], b["losses"], strict=True) for x, y in zip(p, q, strict=True)]
    pairs += list(zip(a["norms"], b["norms"], strict=True))
    return max(abs(x - y) / abs(y) for x, y in pairs)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ep", [1, 2])
def test_two_ranks_equal_one(zero, ep):
    difference = largest_difference(curve(2, zero, ep), curve(1, 1, 1))
    print(f"ZeRO-{zero} EP {ep}: largest relative difference {difference:.1e}")
    assert difference < 1e-5


def test_activation_checkpointing_changes_nothing():
    assert largest_difference(curve(2, 2, 2, "--checkpointing"), curve(1, 1, 1)) < 1e-5


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_learns_like_fp32(zero):
    """bf16 rounds to 3 digits: twenty steps stay within a few percent of the fp32 curve."""
    assert largest_difference(curve(2, zero, 2, "--bf16"), curve(1, 1, 1)) < 0.1
