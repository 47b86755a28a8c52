"""Key/value cache for generation: a new token costs one token, not a forward over the whole text.

Shapes: T tokens of all prompts, S sequences of at most C tokens, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """Keys and values of S sequences, each starting with a prompt; `layers[i]` is for decoder layer i."""

    def __init__(
        self, layers: int, prompt_lengths: list[int], room: int, kv_heads: int, head_width: int, like: Tensor
    ) -> None:
        """An empty cache for prompts of these lengths and up to `room` tokens after each, with the device and dtype of
        `like`. The first forward must fill it with the prompts."""
        shape = (len(prompt_lengths), kv_heads, max(prompt_lengths) + room, head_width)
        self.lengths = torch.tensor(prompt_lengths, device=like.device)  # int64 [S], tokens of each sequence
        self.ahead = torch.zeros_like(self.lengths)  # int64 [S], see `positions`
        self.longest = max(prompt_lengths)  # kept on the host, to avoid a synchronisation with the device
        self.layers = [
            LayerCache(self, prompt_lengths, like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)
        ]
        self.visible = self._visible()

    @property
    def positions(self) -> Tensor:
        """Of the next token of each sequence, int64 [S]: its length, unless `continue_at` said otherwise."""
        return self.lengths + self.ahead

    def continue_at(self, positions: Tensor) -> None:
        """Give the tokens after the prompts these positions and those after them, int64 [S]."""
        self.ahead = positions - self.lengths

    def advance(self) -> None:
        """Count the token that every layer has just stored."""
        self.lengths = self.lengths + 1
        self.longest += 1
        self.visible = self._visible()

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences `rows`, int64 [S']; a sequence may be given several times."""
        self.lengths, self.ahead = (x.index_select(0, rows) for x in (self.lengths, self.ahead))
        self.visible = self._visible()
        for layer in self.layers:
            layer.keys, layer.values = (x.index_select(0, rows) for x in (layer.keys, layer.values))

    def _visible(self) -> Tensor:
        """Attention mask of the next token of each sequence, itself included: bool [S, 1, 1, longest + 1]."""
        places = torch.arange(self.longest + 1, device=self.lengths.device)
        return (places <= self.lengths.unsqueeze(-1))[:, None, None]


class LayerCache:
    """One layer's keys and values, [S, G, C, d] each."""

    def __init__(self, shared: KeyValueCache, prompt_lengths: list[int], keys: Tensor, values: Tensor) -> None:
        self.shared, self.prompt_lengths, self.keys, self.values = shared, prompt_lengths, keys, values

    def store_prompts(self, k: Tensor, v: Tensor) -> None:
        """Packed keys and values [T, G, d] of the prompts, one after another."""
        for cached, packed in ((self.keys, k), (self.values, v)):
            for row, prompt in enumerate(packed.split(self.prompt_lengths)):
                cached[row, :, : len(prompt)] = prompt.transpose(0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the next token of every sequence and return its attention over all tokens so far, itself included.

        q [S, H, d], k and v [S, G, d] -> [S, H, d].
        """
        rows = torch.arange(len(k), device=k.device)
        self.keys[rows, :, self.shared.lengths] = k
        self.values[rows, :, self.shared.lengths] = v
        used = self.shared.longest + 1
        # Query heads that share a key head take the place of query positions, so keys and values are not repeated.
        queries = q.view(len(q), k.shape[1], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(
            queries, self.keys[:, :, :used], self.values[:, :, :used], attn_mask=self.shared.visible
        )
        return out.reshape(q.shape)
