"""Every function of parallel/collectives.py on two ranks against one process that holds all rows.

Rank 0 prints, as JSON, the largest absolute difference of any rank for every case.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_vl.parallel.collectives import gather_rows, own_rank, summed_over_ranks

WIDTH = 3


def largest(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest absolute difference between pairs of equal shapes; 0 where there is nothing."""
    assert all(a.shape == b.shape for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def compare(own: Tensor, every: Tensor, first: int) -> Tensor:
    """Couples rows `own` [n, W], which begin at `first`, with `every` row, differently for every place: a scalar."""
    place = torch.arange(first, first + len(own)) + 1.0
    order = torch.arange(len(every)) + 1.0
    return (place * torch.tanh(own @ every.t() * order).sum(1)).sum()


def gathered(rows: tuple[int, ...]) -> dict[str, float]:
    """Values, and gradients of a sum over own rows that couples them with everyone's."""
    whole = torch.randn(sum(rows), WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = whole @ weight
    parts = expected.split(rows)
    firsts = [sum(rows[:rank]) for rank in range(len(rows))]
    total = sum(compare(part, expected, first) for part, first in zip(parts, firsts, strict=True))
    of_whole, of_weight = torch.autograd.grad(total, (whole, weight))

    rank = own_rank()
    own = slice(firsts[rank], firsts[rank] + rows[rank])
    mine, my_weight = whole.detach()[own].requires_grad_(), weight.detach().requires_grad_()
    projected = mine @ my_weight
    every = gather_rows(projected, rows)
    of_mine, of_my_weight = torch.autograd.grad(compare(projected, every, own.start), (mine, my_weight))
    dist.all_reduce(of_my_weight)  # as the engine does: the parts add up
    ids = torch.arange(sum(rows)) * 2**40 + 3
    return {
        "values": largest((every, expected)),
        "gradients": largest((of_mine, of_whole[own]), (of_my_weight, of_weight)),
        "ids": largest((gather_rows(ids[own], rows), ids)),
    }


def summed() -> dict[str, float]:
    """Each rank's gradient of a nonlinear function of the sum is that of its own part."""
    inputs = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def of_sum(total: Tensor) -> Tensor:
        p = total.softmax(0)
        return -(p * p.log()).sum() + total.pow(3).sum()

    total = (inputs @ weight).tanh().sum(0)
    (of_weight,) = torch.autograd.grad(of_sum(total), weight)
    my_weight = weight.detach().requires_grad_()
    part = (inputs[own_rank()] @ my_weight).tanh()
    sums = summed_over_ranks(part)
    (of_my_weight,) = torch.autograd.grad(of_sum(sums), my_weight)
    mine_alone = largest((of_my_weight, of_weight))
    dist.all_reduce(of_my_weight)
    return {
        "values": largest((sums, total)),
        "gradients": largest((of_my_weight, of_weight)),
        "mine_alone": mine_alone,
        "without_gradient": largest((summed_over_ranks(part.detach()), total)),
    }


def main() -> None:
    dist.init_process_group("gloo")
    found = {str(rows): gathered(rows) for rows in ((3, 2), (0, 5), (5, 0), (1, 1), (0, 0))} | {"summed": summed()}
    of_ranks = [found] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    if own_rank() == 0:
        print(json.dumps({case: {k: max(f[case][k] for f in of_ranks) for k in found[case]} for case in found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
