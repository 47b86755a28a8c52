"""Contrastive losses between this rank's retrieval pairs and those of the whole micro-step, as sums over the former.

Shapes: n pairs of this rank, N pairs of all ranks (of which ours are rows first .. first + n), W embedding width. A
pair is one picture or video with one text; pairs with the same id show the same and are no negatives of each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_sum(
    media: Tensor, text: Tensor, all_media: Tensor, all_text: Tensor, scale: Tensor, negatives: Tensor, first: int
) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, eq. 4; both ways as in Radford et al. 2021, figure 3).

    media, text [n, W] and all_media, all_text [N, W] unit vectors; negatives bool [n, N], see `negative_pairs`. Returns
    the sum over our pairs of the mean of both directions' cross entropies, nats.
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
    """Which pairs are negatives: int64 [n], [N] -> bool [n, N], those with another id."""
    return ids.unsqueeze(1) != all_ids.unsqueeze(0)
