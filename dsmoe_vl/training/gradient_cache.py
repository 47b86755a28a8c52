"""Contrastive loss over all gradient accumulation steps, with the memory of one (Gao et al. 2021, section 3.2).

A first pass without gradients embeds the pairs of every micro-step. The loss over all of them gives the gradient of
each embedding, and a second pass, micro-step by micro-step, backpropagates these gradients through the model.
Shapes: n pairs of a micro-step on this rank, W width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.data.batch import Batch
from dsmoe_vl.tasks.retrieval import contrastive_sum
from dsmoe_vl.tasks.retrieval_head import RetrievalEmbeddings
from dsmoe_vl.tasks.task import TaskOutput


@dataclass(frozen=True)
class CachedGradients:
    """Embedding gradients of one micro-step, and its part of the loss sum (all of it in the first, else 0)."""

    embeddings: RetrievalEmbeddings
    loss_sum: Tensor


def cache_gradients(engine: Any, batches: list[Batch], loss: str) -> list[CachedGradients]:
    """Embed the pairs of all micro-steps and compute the gradients of their joint loss. Collective."""
    engine.eval()
    with torch.no_grad():
        embeddings = [engine(batch)[0].embeddings for batch in batches]
    engine.train()
    sides = zip(*((own.media, own.text) for own in embeddings), strict=True)
    media, text = (torch.cat(side) for side in sides)
    joint = RetrievalEmbeddings(media, text, embeddings[0].scale, embeddings[0].bias)
    leaves = RetrievalEmbeddings(*(value.detach().clone().requires_grad_() for value in joint))
    rows = tuple(sum(counts) for counts in zip(*(batch.pairs_of_ranks for batch in batches), strict=True))
    pairs = replace(batches[0], pair_ids=torch.cat([batch.pair_ids for batch in batches]), pairs_of_ranks=rows)
    loss_sum = contrastive_sum(loss, leaves, pairs)
    found = torch.autograd.grad(loss_sum, list(leaves), allow_unused=True)
    media, text, scale, bias = (
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True)
    )
    sizes = [len(own.media) for own in embeddings]
    caches = [
        CachedGradients(RetrievalEmbeddings(m, t, 0 * scale, 0 * bias), 0 * loss_sum.detach())
        for m, t in zip(media.split(sizes), text.split(sizes), strict=True)
    ]
    caches[0] = CachedGradients(caches[0].embeddings._replace(scale=scale, bias=bias), loss_sum.detach())
    return caches


def with_cached_gradients(output: TaskOutput, cache: CachedGradients) -> TaskOutput:
    """The output plus a retrieval loss with the cached value and gradients."""
    assert output.embeddings is not None, "retrieval is not learned"
    products = [(value * gradient).sum() for value, gradient in zip(output.embeddings, cache.embeddings, strict=True)]
    carried = torch.stack(products).sum()
    retrieval = carried + (cache.loss_sum - carried.detach())
    return output._replace(loss_sums={**output.loss_sums, "retrieval": retrieval})
