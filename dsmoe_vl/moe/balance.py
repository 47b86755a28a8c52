"""Balancing terms as pure functions of `RouterStats`.

Each is a sum over this rank's real tokens, divided by the *global* number of real tokens of the optimizer step, so that
adding up ranks and micro-steps gives the global value however the work is split. Shapes: N MoE layers, E experts.
"""

from __future__ import annotations

from torch import Tensor


def load_balance_loss(probability_sum: Tensor, load_fraction: Tensor, global_tokens: float) -> Tensor:
    """`E sum_e f_e P_e`, summed over layers (Fedus et al. 2021, eq. 4); 1 a layer where routing is even.

    probability_sum [N, E]: sums of router probabilities over real tokens. load_fraction [N, E]: each expert's share of
    the assignments, rows sum to 1. It is taken from the *previous* optimizer step's global counts (uniform at step 0),
    which makes the term linear in this step's tokens and therefore exact under any split of them. Returns a scalar.
    """
    return probability_sum.shape[-1] * (load_fraction * probability_sum).sum() / global_tokens


def router_z_loss(z_sum: Tensor, global_tokens: float) -> Tensor:
    """Mean squared log-partition of the router, summed over layers (Zoph et al. 2022, eq. 5). z_sum [N] -> scalar."""
    return z_sum.sum() / global_tokens
