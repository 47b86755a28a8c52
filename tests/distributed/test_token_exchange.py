"""Tokens to the ranks that have their experts, and back: the values and gradients of one process that has all."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.send_tokens import CASES, RANKS

SCRIPT = Path(__file__).with_name("send_tokens.py")


@functools.cache
def differences():
    return json.loads(run_ranks(SCRIPT, [], RANKS).strip().splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_of_one_process(case):
    found = differences()[case]
    assert found["values"] < 1e-12 and found["gradients"] < 1e-12


def test_bfloat16():
    found = differences()["bfloat16"]
    assert found["values"] < 0.05 and found["gradients"] < 0.1


def test_a_token_goes_to_a_rank_once():
    """Whatever the number of its experts there; the program checks every rank's rows too."""
    assert differences()["all on one rank"]["rows"] == 5
