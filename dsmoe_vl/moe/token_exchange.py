"""Tokens to the ranks that have their experts, and back.

A token goes once to each rank that has one of its experts, with its gates, and comes back once, as the sum of that
rank's experts. So of K experts on the same rank, one row is sent in each direction and not K: with 64 experts of which
a token has 8, on two ranks, a fourth. (DeepSeek-AI 2024, DeepSeek-V3, section 3.2.2, bounds the nodes of a token for
the same reason.)

Shapes: T tokens of this rank, D width, K experts per token, S rows that this rank sends, sorted by the rank that gets
them, N rows that it gets, sorted by the rank that sent them, R assignments of these to experts of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from torch import Tensor

from dsmoe_vl.moe.phases import phase
from dsmoe_vl.moe.rows import Assignments, sum_of_rows

_AS_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers, by the size of a row's numbers


class TokenExchange(NamedTuple):
    """Which tokens of this rank go where, and how many rows come."""

    group: Any
    local: range  # this rank's experts
    tokens: Tensor  # int64 [S]: the token of each row that is sent
    rows: Tensor  # int64 [S]: the rows in the order of their tokens
    starts: Tensor  # int64 [T]: the first of each token in `rows`
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    assignments: int  # of all rows that come, to experts of this rank

    @classmethod
    def plan(cls, experts: Tensor, local: range, ranks: int, group: Any) -> TokenExchange:
        """experts int64 [T, K] of all ranks'. Collective in `group`. The host waits for the sizes."""
        owner = experts // len(local)
        goes = experts.new_zeros(len(experts), ranks, dtype=torch.bool).scatter_(1, owner, True)
        of_rank = experts.new_zeros(ranks).scatter_add_(0, owner.flatten(), torch.ones_like(owner).flatten())
        sizes = torch.stack((goes.sum(0), of_rank), dim=1)
        coming = torch.empty_like(sizes)
        with phase("all_to_all"):
            dist.all_to_all_single(coming, sizes, group=group)
        (sent, _), (received, assignments) = torch.stack((sizes, coming)).transpose(1, 2).tolist()
        tokens = torch.nonzero_static(goes.t().flatten(), size=sum(sent)).squeeze(1) % len(experts)
        of_token = goes.sum(1)
        starts = of_token.cumsum(0) - of_token
        return cls(group, local, tokens, tokens.argsort(stable=True), starts, sent, received, sum(assignments))

    def send(self, x: Tensor, gates: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Assignments]:
        """x [T, D] and gates [T, K], of one type, and the experts int64 [T, K] -> of the rows that come, x [N, D] and
        gates [R], and what this rank's experts compute of them. Collective, and so is its gradient."""
        x, gates, experts = _Send.apply(x, gates, experts, self)
        experts = experts.long() - self.local.start
        chosen = (experts >= 0) & (experts < len(self.local))
        assignments, places = Assignments.of_chosen(experts, chosen, self.assignments, len(self.local))
        return x, gates.flatten().index_select(0, places), assignments

    def send_back(self, x: Tensor) -> Tensor:
        """x [N, D] -> [T, D], the sum of what the ranks computed of a token. Collective, and so is its gradient."""
        out: Tensor = _SendBack.apply(x, self)
        return out

    def forth(self, rows: Tensor) -> Tensor:
        """rows [S, C] -> [N, C]."""
        return self._move(rows, self.sent, self.received)

    def back(self, rows: Tensor) -> Tensor:
        """rows [N, C] -> [T, C], the sum of a token's rows."""
        return sum_of_rows(self._move(rows, self.received, self.sent), self.rows, self.starts)

    def _move(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows, output_split_sizes=received, input_split_sizes=sent, group=self.group)
        return out


class _Send(torch.autograd.Function):
    """All of a row in one message: x, gates, and the numbers of the experts as they are, bit by bit."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, experts: Tensor, exchange: TokenExchange
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.exchange, widths = exchange, (x.shape[1], gates.shape[1], experts.shape[1])
        bits = _AS_BITS[x.element_size()]
        rows = x.new_empty(len(exchange.tokens), sum(widths))
        sources = x, gates, experts.to(bits).view(x.dtype)
        for source, part in zip(sources, rows.split(widths, dim=1), strict=True):
            torch.index_select(source, 0, exchange.tokens, out=part)
        x, gates, experts = exchange.forth(rows).split(widths, dim=1)
        experts = experts.view(bits)
        ctx.mark_non_differentiable(experts)
        return x, gates, experts

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_x: Tensor, grad_gates: Tensor, _: None
    ) -> tuple[Tensor, Tensor, None, None]:
        both = ctx.exchange.back(torch.cat((grad_x, grad_gates), dim=1))
        return *both.split((grad_x.shape[1], grad_gates.shape[1]), dim=1), None, None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: TokenExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.back(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.forth(grad.index_select(0, ctx.exchange.tokens)), None
