"""Rows by expert and back, against autograd's own gathers."""

from __future__ import annotations

import pytest
import torch

from dsmoe_vl.moe.rows import Assignments, combine, dispatch


def naive(x, factors, experts, gates):
    order = experts.flatten().argsort(stable=True)
    rows = x[order // experts.shape[1]] * factors
    back = torch.empty_like(rows)
    back = back.index_copy(0, order, rows).view(*experts.shape, x.shape[1])
    return (back * gates.unsqueeze(-1)).sum(1)


def ours(x, factors, experts, gates):
    assignments = Assignments.of(experts, 8)
    return combine(dispatch(x, assignments) * factors, gates.flatten(), assignments)


@pytest.mark.parametrize(("tokens", "count", "top_k"), [(7, 4, 1), (33, 5, 2), (16, 8, 8), (1, 3, 2), (0, 4, 2)])
@pytest.mark.parametrize("trains", ["everything", "rows alone", "gates alone"])
def test_values_and_gradients(tokens, count, top_k, trains):
    torch.manual_seed(0)
    x, gates = torch.randn(tokens, 6, dtype=torch.float64), torch.rand(tokens, top_k, dtype=torch.float64)
    factors, experts = torch.randn(tokens * top_k, 6, dtype=torch.float64), torch.rand(tokens, count).topk(top_k)[1]
    x.requires_grad_(trains != "gates alone"), gates.requires_grad_(trains != "rows alone")
    inputs = [value for value in (x, gates) if value.requires_grad]
    weight = torch.randn(tokens, 6, dtype=torch.float64)
    for one, other in zip(
        *([out, *torch.autograd.grad((out * weight).sum(), inputs)] for out in (
            made(x, factors, experts, gates) for made in (naive, ours)
        )), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_bfloat16():
    torch.manual_seed(0)
    x, gates = torch.randn(40, 16), torch.rand(40, 2)
    factors, experts = torch.randn(80, 16), torch.rand(40, 4).topk(2)[1]
    found = ours(x.bfloat16(), factors.bfloat16(), experts, gates.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), naive(x, factors, experts, gates), rtol=0.03, atol=0.05)
