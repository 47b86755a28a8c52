"""Contrastive losses of this rank's retrieval pairs against all pairs of the micro-step, summed over this rank's pairs.

Shapes: n pairs of this rank, N pairs of all ranks (this rank's are rows first to first + n - 1), W embedding width.
A pair is one picture or video with one text. Pairs with the same id have the same content and are not negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_sum(
    media: Tensor, text: Tensor, all_media: Tensor, all_text: Tensor, scale: Tensor, negatives: Tensor, first: int
) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, eq. 4; both directions as in Radford et al. 2021, figure 3).

    media, text [n, W] and all_media, all_text [N, W]: unit vectors; negatives: bool [n, N], see `negative_pairs`.
    Returns the sum over this rank's pairs of the cross entropy, averaged over both directions, nats.
    """
    target = torch.arange(first, first + len(media), device=media.device)
    excluded = ~negatives
    excluded[torch.arange(len(media), device=media.device), target] = False
    total = media.new_zeros(())
    for queries, keys in ((media, all_text), (text, all_media)):
        logits = (scale * queries @ keys.t()).masked_fill(excluded, float("-inf"))
        total = total + 0.5 * F.cross_entropy(logits, target, reduction="sum")
    return total


def sigmoid_sum(media: Tensor, all_text: Tensor, scale: Tensor, bias: Tensor, negatives: Tensor, first: int) -> Tensor:
    """`-sum_i sum_j log sigmoid(y_ij (scale x_i . t_j + bias))`, y = 1 for the pair itself, -1 for negatives (Zhai et
    al. 2023, eq. 1, without its division by N). Shapes as in `info_nce_sum`."""
    logits = scale * media @ all_text.t() + bias
    rows = torch.arange(len(media), device=media.device)
    positive = logits[rows, first + rows]
    return F.softplus(-positive).sum() + (F.softplus(logits) * negatives).sum()


def negative_pairs(ids: Tensor, all_ids: Tensor) -> Tensor:
    """Mask of the negatives, the pairs with another id: int64 [n], [N] -> bool [n, N]."""
    return ids.unsqueeze(1) != all_ids.unsqueeze(0)
