"""A step that is not finite on one rank is skipped on all: nothing changes but the step and the learning rate."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("train_skipping.py")
STAGES = ("0", "1", "2", "3")
SETTINGS = {
    "fp32": (2, STAGES, ()),
    "bf16": (2, STAGES, ("--bf16",)),
    "fp32, clipped, no expert parallelism": (2, ("0", "2"), ("--clipping", "0.1", "--ep", "1")),
    "bf16 on one rank": (1, ("0", "2"), ("--clipping", "0.1", "--ep", "1", "--bf16")),
}


@functools.cache
def found(setting):
    """By stage and fault: what every rank found."""
    world_size, stages, flags = SETTINGS[setting]
    arguments = ["--zero", *stages, "--ep", "2", *flags]
    return json.loads(run_ranks(SCRIPT, arguments, world_size, timeout_seconds=240).strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("setting", "stage"), [(setting, stage) for setting, (_, stages, _) in SETTINGS.items() for stage in stages]
)
@pytest.mark.parametrize("fault", ["expert", "loss"])
def test_a_skipped_step_changes_nothing_on_any_rank(setting, stage, fault):
    for own in found(setting)[stage][fault]:
        assert own["skipped"] == [False, True, False]
        assert own["finite_norms"] == [True, False, True]
        assert own["changed"] == [] and own["changed_then"] > 50  # of weights, moments and the router's state
        assert own["lost"] == []  # the next step equals that of a run that never saw the bad one
        assert own["same_rates"]  # as those of a run without a skipped step
        if fault == "loss":  # of rank 0; every rank names it
            assert (own["names"], own["samples"]) == (["loss_caption"], ["sample-101"])
        else:
            assert (own["names"], own["samples"]) == (["the gradient"], [])
