"""The router: chooses the experts of a token from the token, its task and its modality.

Shapes: T tokens, D width, E experts, K experts per token, M modalities.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.moe.balance import updated_selection_bias


class Routing(NamedTuple):
    """The decision for T tokens. A tuple, because ZeRO-3 looks for tensors in tuples only.

    Other files rely on `softmax(logits) = probabilities`: `expert_parallel_capacity.py` lets DeepSpeed make its gates
    from logits, `stats.py` takes the z-loss of them, and the balancing terms need rows of probabilities that sum to 1.
    """

    experts: Tensor  # int64 [T, K]
    gates: Tensor  # float32 [T, K], each row sums to 1; with K = 1 or without renormalisation, p
    probabilities: Tensor  # float32 [T, E]
    logits: Tensor  # float32 [T, E]


class Router(nn.Module):
    """`z = W x + b[task] + u[modality]`, softmax in fp32, the K largest of `p + beta`, their p renormalised to sum 1.

    With K = 1 the gate is p itself (Fedus et al. 2021, eq. 2): renormalised it would always be 1, and the router
    would get no gradient from the task losses. Without `renormalise` all gates are p, as in some released models.

    b and u start at zero (b not in mode "task"), so at first this is the plain softmax gate (Shazeer et al. 2017).
    beta is the aux-loss-free balancing bias (Wang et al. 2024, eq. 3): it affects the choice of experts, never the
    gates; the trainer updates it. Modes:

    - "token": all three terms of z.
    - "plain": z = W x, without task and modality; a baseline.
    - "task": z = b[task], so all tokens of a task go to the same experts.
    - "isolated": as "token", within the experts of the token's modality: expert e belongs to modality e * M // E.
    """

    selection_bias: Tensor  # float32 [E], beta

    def __init__(
        self, width: int, expert_count: int, top_k: int, tasks: int, modalities: int, mode: str = "token",
        renormalise: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.top_k, self.tasks, self.modalities = top_k, tasks, modalities  # ZeRO-3 empties parameters between calls
        self.mode, self.renormalise = mode, renormalise and top_k > 1
        self.weight = nn.Parameter(torch.empty(expert_count, width))
        self.task_bias = nn.Parameter(torch.zeros(tasks, expert_count))
        self.modality_bias = nn.Parameter(torch.zeros(modalities, expert_count))
        self.register_buffer("selection_bias", torch.zeros(expert_count, dtype=torch.float32))

    def forward(self, x: Tensor, task_ids: Tensor, modality_ids: Tensor, noise: Tensor | None = None) -> Routing:
        """x [T, D], task_ids and modality_ids int64 [T]; noise [T, E] is added to z for the choice only."""
        logits = self._logits(x, task_ids, modality_ids)
        probabilities = logits.softmax(dim=-1)
        choosing = probabilities if noise is None else (logits + noise).softmax(dim=-1)
        scores = choosing.detach() + self.selection_bias
        if self.mode == "isolated":  # beta must not make another modality's expert (p = 0) win
            scores = scores.masked_fill(logits.isinf(), float("-inf"))
        experts = scores.topk(self.top_k, dim=-1).indices
        gates = probabilities.gather(-1, experts)
        if self.renormalise:
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        return Routing(experts, gates, probabilities, logits)

    def _logits(self, x: Tensor, task_ids: Tensor, modality_ids: Tensor) -> Tensor:
        # One row for each pair of a task and a modality, so that a token takes one.
        of_modality = 0 * self.modality_bias if self.mode == "task" else self.modality_bias
        biases = self.task_bias.double().unsqueeze(1) + of_modality
        from_ids = _Rows.apply(biases.flatten(0, 1), task_ids * self.modalities + modality_ids)
        from_token = F.linear(x.float(), self.weight.float())
        # Unused terms stay in the graph, so that every parameter has a gradient on every rank.
        if self.mode == "task":
            return from_ids + 0 * from_token
        if self.mode == "plain":
            return from_token + 0 * from_ids
        logits = from_token + from_ids
        if self.mode == "isolated":
            logits = logits.masked_fill(self._owners(x.device) != modality_ids.unsqueeze(-1), float("-inf"))
        return logits

    @torch.no_grad()
    def move_selection_bias(self, load: Tensor, rate: float) -> None:
        """Update beta from a step's global load [E]; in mode "isolated", separately for each modality."""
        if self.mode != "isolated":
            self.selection_bias.copy_(updated_selection_bias(self.selection_bias, load, rate))
            return
        owners = self._owners(load.device)
        for modality in range(self.modalities):
            own = owners == modality
            self.selection_bias[own] = updated_selection_bias(self.selection_bias[own], load[own], rate)

    def _owners(self, device: torch.device) -> Tensor:
        """The modality that each expert belongs to: int64 [E]."""
        experts = len(self.selection_bias)
        return torch.arange(experts, device=device) * self.modalities // experts


class _Rows(torch.autograd.Function):
    """`table[ids]`: float64 [C, E] and int64 [T] -> float32 [T, E].

    The gradient is summed in float64: many small numbers and a few large ones cancel. In float32 the sum over 16,384
    tokens was wrong in the fifth digit, and differed between one rank and two. As a product with one-hot rows, whose
    order of summing does not change from run to run.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.count = len(table)
        return table.float().index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        return F.one_hot(ids, ctx.count).double().t() @ grad.double(), None
