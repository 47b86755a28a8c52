"""Balancing terms as pure functions of `RouterStats`.

There are two kinds:

- Linear terms are sums over this rank's tokens, divided by the *global* number of real tokens of the optimizer step.
  They are exact for any split of a step's tokens into ranks and micro-steps.
- Coupled terms are functions of sums over the global *micro-step*, which the caller has all-reduced. They are exact for
  any split of a micro-step into ranks.

Shapes: N MoE layers, E experts, J tasks, M modalities, G groups of tokens (one, the tasks, or the modalities).
Entropies and mutual information are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance_loss(
    probability_sum: Tensor, load_fraction: Tensor, global_tokens: float, experts: Tensor | None = None
) -> Tensor:
    """`E sum_e f_e P_e`, summed over layers (Fedus et al. 2021, eq. 4); 1 per layer if routing is even.

    probability_sum [N, G, E]: sums of router probabilities over a group's real tokens. load_fraction [N, G, E]: each
    expert's share of the group's assignments, rows sum to 1. It is computed from the *previous* optimizer step's global
    counts (uniform at step 0), so the term is linear in this step's tokens. Returns a scalar; with several groups it
    is their mean, weighted by tokens. experts [N, 1, 1]: E of each layer, if layers differ.
    """
    factor = probability_sum.shape[-1] if experts is None else experts
    return (factor * load_fraction * probability_sum).sum() / global_tokens


def router_z_loss(z_sum: Tensor, global_tokens: float) -> Tensor:
    """Mean squared log-partition of the router, summed over layers (Zoph et al. 2022, eq. 5). z_sum [N] -> scalar."""
    return z_sum.sum() / global_tokens


def local_entropy_loss(entropy_sum: Tensor, global_tokens: Tensor) -> Tensor:
    """Mean entropy of single tokens' routing (Mustafa et al. 2022, eq. 4): small if every token's routing is confident.

    entropy_sum [N, M], global_tokens [M] -> the sum over layers and modalities, a scalar. Linear.
    """
    return (entropy_sum / global_tokens.clamp(min=1)).sum()


def global_entropy_loss(probability_sum: Tensor, tokens: Tensor, threshold: float) -> Tensor:
    """`max(0, threshold - H(mean p))` of each modality (Mustafa et al. 2022, eq. 5 and its threshold): 0 if the
    modality uses at least exp(threshold) experts evenly.

    probability_sum [N, M, E] and tokens [M] of the global micro-step -> the sum over layers and modalities that have
    tokens, a scalar. Coupled.
    """
    mean = probability_sum / tokens.clamp(min=1).unsqueeze(-1)
    short = (threshold - entropy(mean)).clamp(min=0)
    return (short * (tokens > 0)).sum()


def mutual_information(probability_sum: Tensor) -> Tensor:
    """`sum_t sum_e P(t, e) log(P(t, e) / (P(t) P(e)))` of every layer (Chen et al. 2023, Mod-Squad, eq. 4).

    probability_sum [N, J, E] of the global micro-step; P(t, e) is its share of the total. 0 if all tasks use the
    experts in the same way, at most log(min(J, E)). Returns [N]. Coupled; the loss is its negative, summed over layers.
    """
    sums = probability_sum.double()  # float64: a small difference of large entropies
    joint = sums / sums.sum((-2, -1), keepdim=True).clamp(min=1)
    information = entropy(joint.sum(-1)) + entropy(joint.sum(-2)) - entropy(joint.flatten(-2))
    return information.to(probability_sum.dtype)


def entropy(probabilities: Tensor) -> Tensor:
    """`-sum p log p` over the last dimension; 0 log 0 is 0, with a finite gradient."""
    return -(probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()).sum(-1)


def updated_selection_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The aux-loss-free balancing bias after a step (Wang et al. 2024, algorithm 1): up by `rate` for experts with less
    than the mean load, down for those with more. bias, load [N, E] -> [N, E]."""
    return bias + rate * torch.sign(load.mean(-1, keepdim=True) - load)
