"""The differentiable exchange between ranks: the values and the gradients of one process that holds everything."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from dsmoe_vl.parallel.collectives import gather_rows, own_rank, summed_over_ranks
from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).with_name("exchange.py")


@functools.cache
def differences():
    return json.loads(run_ranks(SCRIPT, [], 2).strip().splitlines()[-1])


@pytest.mark.parametrize("rows", [(3, 2), (0, 5), (5, 0), (1, 1), (0, 0)])
def test_gathered_rows_are_those_of_one_process(rows):
    """Also where one rank has no rows, or none has any: it takes part, and none waits for ever."""
    found = differences()[str(rows)]
    assert found["values"] < 1e-6 and found["gradients"] < 1e-5 and found["ids"] == 0


def test_parts_of_a_function_of_the_sum_add_up():
    found = differences()["summed"]
    assert found["values"] < 1e-6 and found["without_gradient"] < 1e-6
    assert found["gradients"] < 1e-5
    assert found["mine_alone"] > 1e-2  # the test can tell


def test_one_process_needs_no_exchange():
    x = torch.randn(3, 2, requires_grad=True)
    assert own_rank() == 0
    assert gather_rows(x, (3,)) is x and summed_over_ranks(x) is x
