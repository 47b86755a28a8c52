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
from dsmoe_vl.moe.rows import Assignments, Early, sum_of_rows

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

    def send(self, x: Tensor, gates: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Assignments, Early]:
        """x [T, D] and gates [T, K], of one type, and the experts int64 [T, K] -> of the rows that come, x [N, D] and
        gates [R], and what this rank's experts compute of them. Collective, and so is its gradient, which the last of
        what is returned may begin to send."""
        gradient = _Gradient(self)
        x, gates, experts = _Send.apply(x, gates, experts, gradient)
        experts = experts.long() - self.local.start
        chosen = (experts >= 0) & (experts < len(self.local))
        assignments, places = Assignments.of_chosen(experts, chosen, self.assignments, len(self.local))
        gradient.places, gradient.top_k = places, chosen.shape[1]
        return x, gates.flatten().index_select(0, places), assignments, gradient.begin

    def send_back(self, x: Tensor) -> Tensor:
        """x [N, D] -> [T, D], the sum of what the ranks computed of a token. Collective, and so is its gradient."""
        out: Tensor = _SendBack.apply(x, self)
        return out

    def forth(self, rows: Tensor) -> Tensor:
        """rows [S, C] -> [N, C]."""
        return self._move(rows, self.sent, self.received).arrived()

    def begin_back(self, rows: Tensor) -> _Moving:
        """rows [N, C], to be summed by `summed`."""
        return self._move(rows, self.received, self.sent)

    def summed(self, moving: _Moving) -> Tensor:
        """The sum of a token's rows: [T, C]."""
        return sum_of_rows(moving.arrived(), self.rows, self.starts)

    def _move(self, rows: Tensor, sent: list[int], received: list[int]) -> _Moving:
        out = rows.new_empty(sum(received), rows.shape[1])
        work = dist.all_to_all_single(
            out, rows, output_split_sizes=received, input_split_sizes=sent, group=self.group, async_op=True
        )
        return _Moving(rows, out, work)


class _Moving(NamedTuple):
    """Rows on their way."""

    sent: Tensor  # until they have arrived
    received: Tensor
    work: Any

    def arrived(self) -> Tensor:
        """Waits for them; on a GPU the stream waits, not the host."""
        with phase("all_to_all"):
            self.work.wait()
        return self.received


class _Gradient:
    """Of what was sent, on its way back. It may travel while the gradients of the experts' weights are computed."""

    def __init__(self, exchange: TokenExchange) -> None:
        self.exchange = exchange
        self.places, self.top_k = torch.empty(0), 0  # int64 [R]: where the gates are in [N, K], flattened
        self.moving: _Moving | None = None

    def begin(self, x: Tensor, gates: Tensor) -> None:
        """All of the gradients of x [N, D] and gates [R]. Collective."""
        of_gates = gates.new_zeros(len(x) * self.top_k).index_copy_(0, self.places, gates)
        self.send(x, of_gates.view(len(x), self.top_k))

    def send(self, x: Tensor, gates: Tensor) -> None:
        """x [N, D], gates [N, K]. Collective."""
        self.moving = self.exchange.begin_back(torch.cat((x, gates), dim=1))


class _Send(torch.autograd.Function):
    """All of a row in one message: x, gates, and the numbers of the experts as they are, bit by bit."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, experts: Tensor, gradient: _Gradient
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.gradient, widths = gradient, (x.shape[1], gates.shape[1], experts.shape[1])
        exchange, bits = gradient.exchange, _AS_BITS[x.element_size()]
        assert len(exchange.local) * len(exchange.sent) <= torch.iinfo(bits).max + 1, (
            "too many experts for their numbers"
        )
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
        gradient, widths = ctx.gradient, (grad_x.shape[1], grad_gates.shape[1])
        if gradient.moving is None:
            gradient.send(grad_x, grad_gates)
        moving, gradient.moving = gradient.moving, None
        return *gradient.exchange.summed(moving).split(widths, dim=1), None, None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: TokenExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.summed(exchange.begin_back(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.forth(grad.index_select(0, ctx.exchange.tokens)), None
