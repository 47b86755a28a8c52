"""How tensors of other models become ours, and ours become theirs: one target at a time, so that nothing is in memory
twice.

Shapes: H heads, d head width, D width, C = 3 * patch_size**2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_vl.moe.expert_names import expert_name

Make = Callable[[Sequence[Tensor]], Tensor]
Undo = Callable[[Tensor], Sequence[Tensor | None]]


def only(found: Sequence[Tensor]) -> Tensor:
    """The one source, as it is."""
    (tensor,) = found
    return tensor


def joined(found: Sequence[Tensor]) -> Tensor:
    """Sources one after another."""
    return torch.cat(list(found))


def alone(target: Tensor) -> tuple[Tensor]:
    """The inverse of `only`."""
    return (target,)


def halved(target: Tensor) -> tuple[Tensor, ...]:
    """The inverse of `joined` for two equal parts."""
    return target.chunk(2)


def in_thirds(target: Tensor) -> tuple[Tensor, ...]:
    """The inverse of `joined` for three equal parts."""
    return target.chunk(3)


def only_row(found: Sequence[Tensor]) -> Tensor:
    """The one row of the one source, [1, ...]."""
    return only(found).squeeze(0)


def one_row(target: Tensor) -> tuple[Tensor]:
    """The inverse of `only_row`."""
    return (target.unsqueeze(0),)


@dataclass(frozen=True)
class Target:
    """A tensor of our model, and the tensors of theirs that it is made of. `how`: in words, for origin.json.

    `undo` is the inverse of `make`: one tensor for each source, or None where another target gives that source. Targets
    without `undo` can be imported only. A target without sources is fp32, and made of nothing else. `stack`: if above
    0, the one source has the matrices of so many experts, [E, in, out], of which this is one, or some rows of one.
    """

    name: str
    sources: tuple[str, ...]
    make: Make = only
    how: str = "as it is"
    undo: Undo | None = None
    stack: int = 0

    def parts(self, value: Tensor) -> list[tuple[str, Tensor]]:
        """Their tensors, by name, from ours."""
        undo = alone if self.undo is None and self.make is only else self.undo
        assert undo is not None, f"{self.name} can be imported only"
        found = zip(self.sources, undo(value), strict=True)
        return [(name, part) for name, part in found if part is not None]


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


def turned_back(head_width: int) -> Undo:
    """The inverse of `turned`."""
    return lambda target: (from_neighbours(target, head_width),)


def qkv(head_width: int) -> Make:
    """Queries, keys and values to one matrix or bias, the first two in our order."""

    def make(found: Sequence[Tensor]) -> Tensor:
        q, k, v = found
        return torch.cat((to_neighbours(q, head_width), to_neighbours(k, head_width), v))

    return make


def fused_qkv(head_width: int) -> Make:
    """As `qkv`, of one source that has the three of equal size one after another."""
    return lambda found: qkv(head_width)(only(found).chunk(3))


def split_fused_qkv(head_width: int) -> Undo:
    """The inverse of `fused_qkv`."""

    def undo(target: Tensor) -> tuple[Tensor]:
        q, k, v = target.chunk(3)
        return (torch.cat((from_neighbours(q, head_width), from_neighbours(k, head_width), v)),)

    return undo


def split_qkv(head_width: int, heads: int, kv_heads: int, turn: bool = True) -> Undo:
    """The inverse of `qkv`; with `turn` false, rotary pairs stay side by side."""

    def undo(target: Tensor) -> Sequence[Tensor]:
        q, k, v = target.split([count * head_width for count in (heads, kv_heads, kv_heads)])
        return (from_neighbours(q, head_width), from_neighbours(k, head_width), v) if turn else (q, k, v)

    return undo


def expert_targets(stacked: str, number: int, sources: tuple[str, str, str]) -> list[Target]:
    """Of one expert: `sources` are its gate (w1), down (w2) and up (w3) matrices. `stacked`: up to ".experts"."""
    names = (expert_name(f"{stacked}.{weight}", number) for weight in ("w1", "w2", "w3"))
    return [Target(name, (source,)) for name, source in zip(names, sources, strict=True)]


def expert_of(number: int, shape: tuple[int, int], rows: slice) -> Make:
    """Rows of one expert's matrix. The source stacks those of all experts, [E, *shape], or transposed, as some versions
    of transformers write them; the two sizes must differ."""

    def make(found: Sequence[Tensor]) -> Tensor:
        matrix = only(found)[number]
        return (matrix.t() if tuple(matrix.shape) == shape[::-1] else matrix)[rows].contiguous()

    return make


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
