"""Ten steps with the L1 term: exact zeros, as many on two ranks as on one, counted once each and kept by bf16."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from tests.distributed.ranks import run_ranks
from tests.distributed.train_sparse import L1

SCRIPT = Path(__file__).with_name("train_sparse.py")
STAGES = (0, 1, 2, 3)


@functools.cache
def trained(world_size, ep, stages, *flags):
    """By ZeRO stage: what `sparsity` said after every step, and the gathered weights."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder, "--ep", str(ep), "--zero", *map(str, stages), *flags]
        said = json.loads(run_ranks(SCRIPT, arguments, world_size, timeout_seconds=240).strip().splitlines()[-1])
        return {stage: (said[str(stage)], WeightsFile(Path(folder, str(stage))).load()) for stage in stages}


def counted(weights):
    """Omega and the fractions of zeros by counting every parameter of the one-process model."""
    omega, zeros, sizes = 0.0, {True: 0, False: 0}, {True: 0, False: 0}
    for name, value in weights.items():
        if name.endswith("selection_bias"):  # a buffer
            continue
        is_expert = ".experts." in name
        coefficient = L1.vectors if value.dim() < 2 or name.endswith("_bias") else L1.matrices
        omega += (L1.experts if is_expert else coefficient) * float(value.double().abs().sum())
        zeros[is_expert] += int((value == 0).sum())
        sizes[is_expert] += value.numel()
    return {
        "omega": omega,
        "zero_fraction": sum(zeros.values()) / sum(sizes.values()),
        "zero_fraction_experts": zeros[True] / sizes[True],
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ep", [1, 2])
def test_two_ranks_equal_one(ep, stage):
    ((one, _),) = trained(1, 1, (0,)).values()
    two, weights = trained(2, ep, STAGES)[stage]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["omega"] == pytest.approx(theirs["omega"], rel=1e-5)
        for name in ("zero_fraction", "zero_fraction_experts"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)  # four weights of all, one or two of the experts
    assert two[-1] == pytest.approx(counted(weights), rel=1e-6)
    assert two[-1]["zero_fraction_experts"] > 0.1 and two[-1]["omega"] < 0.9 * two[0]["omega"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zeros_survive_bf16(stage):
    said, weights = trained(2, 2, (1, 2, 3), "--bf16")[stage]
    assert weights["layers.1.feed_forward.experts.w1"].dtype == torch.bfloat16
    found = counted(weights)
    for name in ("zero_fraction", "zero_fraction_experts"):
        assert said[-1][name] == pytest.approx(found[name], rel=1e-9)
    assert found["zero_fraction_experts"] > 0.1
    assert said[-1]["omega"] == pytest.approx(found["omega"], rel=1e-3)
