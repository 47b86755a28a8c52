"""The router: which experts a token goes to, knowing its task and its modality.

Shapes: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """The decision for T tokens. A tuple, because ZeRO-3 looks for tensors in tuples only."""

    experts: Tensor  # int64 [T, K]
    gates: Tensor  # float32 [T, K], each row sums to 1
    probabilities: Tensor  # float32 [T, E]
    logits: Tensor  # float32 [T, E]


class Router(nn.Module):
    """`z = W x + b[task] + u[modality]`, softmax in fp32, the K most probable experts, gates renormalised to sum 1.

    b and u start at zero: before they learn, this is the plain softmax gate (Shazeer et al. 2017).
    """

    def __init__(self, width: int, expert_count: int, top_k: int, tasks: int, modalities: int) -> None:
        super().__init__()
        self.top_k, self.tasks, self.modalities = top_k, tasks, modalities  # ZeRO-3 empties shapes between calls
        self.weight = nn.Parameter(torch.empty(expert_count, width))
        self.task_bias = nn.Parameter(torch.zeros(tasks, expert_count))
        self.modality_bias = nn.Parameter(torch.zeros(modalities, expert_count))

    def forward(self, x: Tensor, task_ids: Tensor, modality_ids: Tensor) -> Routing:
        """x [T, D], task_ids and modality_ids int64 [T]."""
        logits = F.linear(x.float(), self.weight.float())
        logits = logits + F.embedding(task_ids, self.task_bias) + F.embedding(modality_ids, self.modality_bias)
        probabilities = logits.softmax(dim=-1)
        chosen, experts = probabilities.topk(self.top_k, dim=-1)
        gates = chosen / chosen.sum(dim=-1, keepdim=True)
        return Routing(experts, gates, probabilities, logits)
