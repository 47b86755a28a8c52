"""The vision-language transformer: pictures, speech and text in one packed sequence, hidden states out.

Shapes: T tokens of all packs, N patches, Q cells, D width, V vocabulary, X target positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmoe_vl.config.recipe import RECOMPUTED, Recipe
from dsmoe_vl.config.task_table import task_rows
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.segment import Modality
from dsmoe_vl.model.attention import Attention, SegmentLayout
from dsmoe_vl.model.cache import KeyValueCache, LayerCache
from dsmoe_vl.model.layers import GatedSwiGLU, RMSNorm, SwiGLU
from dsmoe_vl.model.lora import add_adapters
from dsmoe_vl.model.rotary import Rotary
from dsmoe_vl.model.speech import SpeechEncoder
from dsmoe_vl.model.vision import Connector, VisionEncoder
from dsmoe_vl.moe.capacity_feed_forward import CapacityFeedForward
from dsmoe_vl.moe.experts import Experts
from dsmoe_vl.moe.feed_forward import MoEFeedForward
from dsmoe_vl.moe.router import Router
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.planner.activations import LOSS_CHUNK
from dsmoe_vl.planner.parameters import experts_of_layers


@dataclass(frozen=True)
class TokenContext:
    """Token metadata for the decoder layers. int64 [T], except rotation complex64 and real bool."""

    rotation: Tensor
    task_ids: Tensor
    modality_ids: Tensor
    real: Tensor
    layout: SegmentLayout | None  # None: one new token per cached sequence


class DecoderLayer(nn.Module):
    """Pre-norm causal attention, then a dense or sparse feed-forward."""

    def __init__(self, recipe: Recipe, index: int, recomputes_experts: bool = False) -> None:
        super().__init__()
        model, moe = recipe.model, recipe.moe
        self.recomputes_experts = recomputes_experts
        self.attention_norm = RMSNorm(model.width, model.norm_eps)
        self.attention = Attention(
            model.width, model.heads, model.kv_heads, causal=True, head_width=model.head_width, qk_norm=model.qk_norm,
            norm_eps=model.norm_eps, qkv_bias=model.qkv_bias,
        )  # fmt: skip
        self.feed_forward_norm = RMSNorm(model.width, model.norm_eps)
        self.sparse = index >= moe.first_dense_layers
        self.feed_forward: nn.Module
        if self.sparse:
            self.feed_forward = _sparse_feed_forward(recipe, experts_of_layers(recipe)[index - moe.first_dense_layers])
        else:
            self.feed_forward = SwiGLU(model.width, model.ffn_width)

    def forward(
        self, x: Tensor, context: TokenContext, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """x [T, D] -> ([T, D], this layer's statistics; None if dense)."""
        x = x + self.attention(self.attention_norm(x), context.rotation, context.layout, cache)
        inner = self.feed_forward_norm(x)
        if not self.sparse:
            return x + self.feed_forward(inner), None
        inputs = inner, context.task_ids, context.modality_ids, context.real
        if self.recomputes_experts and torch.is_grad_enabled():
            out, stats = checkpoint(self.feed_forward, *inputs, use_reentrant=False)
        else:
            out, stats = self.feed_forward(*inputs)
        return x + out, stats


def _sparse_feed_forward(recipe: Recipe, expert_count: int) -> nn.Module:
    width, moe = recipe.model.width, recipe.moe
    tasks, modalities = task_rows(recipe.model.hears), recipe.model.modalities
    router = Router(width, expert_count, moe.top_k, tasks, modalities, moe.routing, moe.renormalise)
    experts = Experts(expert_count, width, moe.ffn_width)
    kind = GatedSwiGLU if moe.shared_gate else SwiGLU
    shared = kind(width, moe.shared_ffn_width) if moe.shared_ffn_width else None
    if moe.backend == "capacity":
        return CapacityFeedForward(moe, width, router, experts, shared)
    return MoEFeedForward(router, experts, shared)


class LanguageHead(nn.Module):
    """The output projection, and its loss, in chunks: all logits never exist at once. `tied`: it is the embedding."""

    def __init__(self, embedding: nn.Embedding, tied: bool) -> None:
        super().__init__()
        self.weight = embedding.weight if tied else nn.Parameter(torch.empty_like(embedding.weight))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden [X, D] -> logits [X, V]; with targets int64 [X] -> the *sum* of their cross entropies, fp32, nats."""
        if targets is None:
            return F.linear(hidden, self.weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, wanted in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            if len(hidden) > LOSS_CHUNK:
                total = total + checkpoint(self._loss_sum, rows, wanted, use_reentrant=False)
            else:
                total = total + self._loss_sum(rows, wanted)
        return total

    def _loss_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, self.weight).float(), targets, reduction="sum")


class VisionLanguageModel(nn.Module):
    """Vision encoder, connector, perhaps a speech encoder, decoder, and the task heads from `tasks/registry.py`."""

    def __init__(
        self,
        recipe: Recipe,
        recompute: str = "none",
        heads: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        model = recipe.model
        self.rotary = Rotary(model)
        self.replaces_placeholder = model.vision.placeholder == "replace"
        again = RECOMPUTED[recompute]
        self.recomputes_layers = "decoder" in again
        self.vision = VisionEncoder(model.vision, recomputes_layers="vision" in again)
        self.connector = Connector(model.vision, model.width)
        self.speech = SpeechEncoder(model.speech, model.width) if model.hears else None
        self.embedding = nn.Embedding(recipe.tokenizer.vocab_size, model.width)
        self.layers = nn.ModuleList(DecoderLayer(recipe, index, recompute == "moe") for index in range(model.layers))
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.head = LanguageHead(self.embedding, model.tied)
        for name, head in heads.items():
            self.add_module(name, head)
        add_adapters(self, recipe.lora)

    def forward(self, batch: Batch, cache: KeyValueCache | None = None) -> tuple[Tensor, RouterStats | None]:
        """Hidden states [T, D] of a batch, after the final norm, and the routing of the sparse layers. With a cache
        (one sequence per segment) `extend` can continue the segments.

        Every batch uses every parameter, so all ranks run the same collectives.
        """
        context = TokenContext(
            rotation=self.rotary(batch.places if self.rotary.by_place else batch.positions),
            task_ids=batch.task_ids,
            modality_ids=batch.modality_ids,
            real=batch.real,
            layout=SegmentLayout(batch.cu_segments, batch.max_segment),
        )
        if cache is not None and self.rotary.by_place:
            last = batch.places.index_select(0, batch.cu_segments[1:] - 1)
            cache.continue_at(last.amax(dim=-1) + 1)
        cells, *deep = self._embed_pictures(batch)
        return self._decode(self._with_speech(self._embed_tokens(batch) + cells, batch), context, cache, deep)

    def extend(self, tokens: Tensor, task_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """One more text token for each of the S cached sequences: int64 [S] each -> hidden states [S, D]."""
        context = TokenContext(
            rotation=self.rotary(cache.positions),
            task_ids=task_ids,
            modality_ids=torch.full_like(task_ids, Modality.TEXT),
            real=torch.ones_like(task_ids, dtype=torch.bool),
            layout=None,
        )
        hidden, _ = self._decode(self.embedding(tokens), context, cache)
        cache.advance()
        return hidden

    def _embed_tokens(self, batch: Batch) -> Tensor:
        """The token embeddings [T, D]; zero where cells take their place."""
        embedded = self.embedding(batch.tokens)
        if not self.replaces_placeholder:
            return embedded
        kept = embedded.new_ones(len(embedded) + 1, 1).index_fill(0, batch.cell_position, 0.0)
        return embedded * kept[:-1]

    def _embed_pictures(self, batch: Batch) -> list[Tensor]:
        """Picture features, zero for text tokens: [T, D] to add to the token embeddings, and one more for each of the
        first decoder layers that has a tap, to add to what leaves it."""
        layout = SegmentLayout(batch.cu_pictures, batch.max_picture)
        features = self.vision(batch.patches, batch.patch_positions, layout)
        found = self.connector(features, batch.patch_positions, batch.cell_time)
        return [self._at_tokens(cells, batch) for cells in found]

    def _with_speech(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, D] with the features of recordings added to their tokens."""
        if self.speech is None:
            return x
        cells = self.speech(batch.mel, SegmentLayout(batch.cu_recordings, batch.max_recording))
        heard = x.new_zeros(len(x) + 1, x.shape[-1])  # the last row receives the silence of a batch without speech
        return x + heard.index_add(0, batch.speech_position, cells.type_as(x))[:-1]

    def _at_tokens(self, cells: Tensor, batch: Batch) -> Tensor:
        """[Q, D] -> [T, D]: at each token the mean of its cells."""
        placed = cells.new_zeros(len(batch.tokens) + 1, cells.shape[-1])  # the last row receives the padding cells
        placed = placed.index_add(0, batch.cell_position, cells * batch.cell_weight.unsqueeze(-1).type_as(cells))
        if len(batch.frame_tokens):
            shares = batch.cell_frame_weight.unsqueeze(-1).type_as(cells)
            placed = placed.index_add(0, batch.cell_frame, cells * shares)
        return placed[:-1]

    def _decode(
        self, x: Tensor, context: TokenContext, cache: KeyValueCache | None, deep: Sequence[Tensor] = ()
    ) -> tuple[Tensor, RouterStats | None]:
        collected = []
        for index, layer in enumerate(self.layers):
            if self.recomputes_layers and torch.is_grad_enabled():
                x, stats = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x, stats = layer(x, context, None if cache is None else cache.layers[index])
            if stats is not None:
                collected.append(stats)
            if index < len(deep):
                x = x + deep[index]
        return self.norm(x), RouterStats.stack(collected)
