"""Twenty steps in bf16 on one GPU at ZeRO-2 and ZeRO-3 against the fp32 curve of the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.test_partition_parity import SCRIPT, curve, largest_difference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: training on CUDA was not checked")


@pytest.mark.parametrize("zero", [2, 3])
def test_bf16_on_one_gpu_learns_like_fp32_on_the_cpu(zero):
    arguments = ["--zero", str(zero), "--ep", "1", "--bf16", "--device", "cuda"]
    output = run_ranks(SCRIPT, arguments, 1, DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES="0")
    assert largest_difference(json.loads(output.strip().splitlines()[-1]), curve(1, 1, 1)) < 0.1
