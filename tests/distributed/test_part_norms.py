"""The gradient's norm by part of the model is the same on one rank and on two, whatever ZeRO divides."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("train_part_norms.py")
STAGES = ("0", "1", "2", "3")


@functools.cache
def norms(world_size, ep, *flags):
    """By ZeRO stage: the norms of both steps."""
    stages = STAGES if world_size > 1 else STAGES[:1]
    out = run_ranks(SCRIPT, ["--zero", *stages, "--ep", str(ep), *flags], world_size, timeout_seconds=240)
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ep", [1, 2])
def test_two_ranks_equal_one(ep, stage):
    for ours, theirs in zip(norms(2, ep)[stage], norms(1, 1)["0"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert math.hypot(*(norm for part, norm in ours.items() if part != "all")) == pytest.approx(
            ours["all"], rel=1e-5
        )
        assert min(ours.values()) > 0


@pytest.mark.parametrize("stage", STAGES)
def test_bf16(stage):
    for ours, theirs in zip(norms(2, 2, "--bf16")[stage], norms(1, 1)["0"], strict=True):
        assert math.hypot(*(norm for part, norm in ours.items() if part != "all")) == pytest.approx(
            ours["all"], rel=1e-2
        )
        assert ours["experts"] == pytest.approx(theirs["experts"], rel=0.1)
