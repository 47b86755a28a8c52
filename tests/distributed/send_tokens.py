"""moe/token_exchange.py on three ranks against one process that has all tokens and experts.

Rank 0 prints, as JSON, the largest absolute difference of any rank for every case, and the rows that were sent.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_vl.moe.experts import Experts
from dsmoe_vl.moe.feed_forward import run_sorted
from dsmoe_vl.moe.token_exchange import TokenExchange
from dsmoe_vl.parallel.process_group import start_process_group
from dsmoe_vl.parallel.ranks import Ranks
from tests.distributed.exchange import largest

RANKS, WIDTH, HIDDEN = 3, 6, 10
CASES = {  # tokens of each rank, experts of each rank, experts per token, the experts that may be chosen
    "even": ((5, 5, 5), 4, 3, range(12)),
    "uneven": ((7, 1, 4), 4, 5, range(12)),
    "no tokens on a rank": ((0, 6, 2), 2, 2, range(6)),
    "no rows for a rank": ((4, 3, 5), 2, 2, range(2, 6)),
    "all on one rank": ((4, 3, 5), 4, 4, range(4, 8)),
    "one expert a token": ((4, 3, 5), 2, 1, range(6)),
    "no tokens": ((0, 0, 0), 2, 2, range(6)),
}


def bank(count: int, dtype: torch.dtype) -> Experts:
    experts = Experts(count, WIDTH, HIDDEN).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts


def compare(case: str, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    tokens, of_rank, top_k, allowed = CASES[case]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(tokens), WIDTH, generator=generator).to(dtype)
    gates = torch.rand(sum(tokens), top_k, generator=generator).to(dtype)
    gates[::2, 0] = 0  # its gradient is none
    scores = torch.rand(sum(tokens), of_rank * RANKS, generator=generator)
    scores[:, [expert for expert in range(of_rank * RANKS) if expert not in allowed]] = -1
    experts = scores.topk(top_k).indices
    weights = torch.randn(sum(tokens), WIDTH, generator=generator).to(dtype)

    whole = bank(of_rank * RANKS, dtype)
    inputs = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
    expected = run_sorted(whole, *(inputs[0], experts, inputs[1]), of_rank * RANKS)
    expected_grads = torch.autograd.grad((expected * weights).sum(), [*inputs, *whole.parameters()])

    rank = dist.get_rank()
    first = sum(tokens[:rank])
    own, local = slice(first, first + tokens[rank]), range(rank * of_rank, (rank + 1) * of_rank)
    mine = Experts(of_rank, WIDTH, HIDDEN).to(dtype)
    for ours, all_of_them in zip(mine.parameters(), whole.parameters(), strict=True):
        ours.data.copy_(all_of_them.data[local.start : local.stop])
    inputs = [value[own].clone().requires_grad_() for value in (x, gates)]
    exchange = TokenExchange.plan(experts[own], local, RANKS, None)
    out = exchange.send_back(mine(*exchange.send(*inputs, experts[own])))
    grads = torch.autograd.grad((out * weights[own]).sum(), [*inputs, *mine.parameters()])
    parts = [value[own] for value in expected_grads[:2]]
    parts += [value[local.start : local.stop] for value in expected_grads[2:]]
    assert len(exchange.tokens) == sum(exchange.sent) == len(distinct(experts[own], of_rank))
    return {
        "values": largest((out, expected[own])),
        "gradients": largest(*zip(grads, parts, strict=True)),
        "rows": float(len(exchange.tokens)),
    }


def distinct(experts: Tensor, of_rank: int) -> set[tuple[int, int]]:
    """Tokens with the ranks that have one of their experts."""
    return {(token, expert // of_rank) for token, row in enumerate(experts.tolist()) for expert in row}


def main() -> None:
    start_process_group(Ranks.discover(), "cpu")
    found = {case: compare(case) for case in CASES}
    found["bfloat16"] = compare("uneven", torch.bfloat16)
    of_ranks = [found] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    if dist.get_rank() == 0:
        print(json.dumps({case: {k: max(f[case][k] for f in of_ranks) for k in found[case]} for case in found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
