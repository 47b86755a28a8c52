"""How tensors of other models become ours: one target at a time, so that nothing is in memory twice.

Shapes: H heads, d head width, D width, C = 3 * patch_size**2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_vl.moe.placement import expert_name

Make = Callable[[Sequence[Tensor]], Tensor]


def only(found: Sequence[Tensor]) -> Tensor:
    """The one source, as it is."""
    (tensor,) = found
    return tensor


def joined(found: Sequence[Tensor]) -> Tensor:
    """Sources one after another."""
    return torch.cat(list(found))


@dataclass(frozen=True)
class Target:
    """A tensor of our model. `how`: in words, for origin.json. Without sources it is fp32, and made of nothing else."""

    name: str
    sources: tuple[str, ...]
    make: Make = only
    how: str = "as it is"


def neighbours(head_width: int) -> Tensor:
    """Rotary embeddings of Hugging Face's models rotate feature i with i + d/2, ours 2i with 2i + 1: int64 [d], the
    source of each of our features."""
    return torch.arange(head_width).view(2, head_width // 2).t().reshape(-1)


def to_neighbours(rows: Tensor, head_width: int) -> Tensor:
    """Rows of queries or keys, [H * d, ...], in our order; also a norm's weights, [d] or [H * d]."""
    heads = rows.reshape(-1, head_width, *rows.shape[1:])
    return heads[:, neighbours(head_width)].reshape(rows.shape)


def from_neighbours(rows: Tensor, head_width: int) -> Tensor:
    """The inverse of `to_neighbours`."""
    heads = rows.reshape(-1, head_width, *rows.shape[1:])
    return heads[:, neighbours(head_width).argsort()].reshape(rows.shape)


def turned(head_width: int) -> Make:
    """`to_neighbours` of the one source."""
    return lambda found: to_neighbours(only(found), head_width)


def qkv(head_width: int) -> Make:
    """Queries, keys and values to one matrix or bias, the first two in our order."""

    def make(found: Sequence[Tensor]) -> Tensor:
        q, k, v = found
        return torch.cat((to_neighbours(q, head_width), to_neighbours(k, head_width), v))

    return make


def expert_targets(stacked: str, number: int, sources: tuple[str, str, str]) -> list[Target]:
    """Of one expert: `sources` are its gate (w1), down (w2) and up (w3) matrices. `stacked`: up to ".experts"."""
    names = (expert_name(f"{stacked}.{weight}", number) for weight in ("w1", "w2", "w3"))
    return [Target(name, (source,)) for name, source in zip(names, sources, strict=True)]


def folded_pixels(
    weight: Tensor, bias: Tensor | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A patch embedding of `(u / 255 - mean) / std` as one of our `u / 127.5 - 1`: weight [D, C], by channel, row and
    column, and bias [D], computed in float64."""
    scale = 0.5 / torch.tensor(std, dtype=torch.float64)
    shift = (0.5 - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
    by_channel = weight.double().view(len(weight), 3, -1)
    moved = (by_channel.sum(-1) * shift).sum(-1)
    old = torch.zeros_like(moved) if bias is None else bias.double()
    return (by_channel * scale[:, None]).flatten(1).to(weight.dtype), (old + moved).to(weight.dtype)
