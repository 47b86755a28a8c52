"""Twenty steps in bf16 on one GPU at ZeRO-2 and ZeRO-3 against the fp32 curve of the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import WarmRanks
from tests.distributed.test_partition_parity import SCRIPT, curve

FLAGS = ("--accumulation", "2", "--steps", "20")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: training on CUDA was not checked")


@pytest.mark.parametrize("zero", [2, 3])
def test_bf16_on_one_gpu_learns_like_fp32_on_the_cpu(zero):
    gpu = WarmRanks(SCRIPT, 1, ("cuda",), DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES="0")
    rounded, exact = gpu.ask(["--zero", str(zero), "--ep", "1", "--bf16", *FLAGS]), curve(1, 1, 1, *FLAGS)
    gpu.close()
    for ours, theirs in zip(rounded["terms"], exact["terms"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)


def test_capacity_backend_on_one_gpu_learns_like_fp32_on_the_cpu():
    flags = ("--zero", "2", "--ep", "1", "--moe", '{"backend": "capacity"}', *FLAGS)
    gpu = WarmRanks(SCRIPT, 1, ("cuda",), DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES="0")
    rounded, exact = gpu.ask([*flags, "--bf16"]), curve(1, 2, 1, *flags[4:])
    gpu.close()
    for ours, theirs in zip(rounded["terms"], exact["terms"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)
