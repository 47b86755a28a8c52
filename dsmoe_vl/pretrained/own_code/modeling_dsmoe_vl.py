"""A vision-language model that was trained with dsmoe_vl, for transformers: still images and text in, text out.

`launch/export.py --own-code` copies the files of this folder beside the weights; load them with
`trust_remote_code=True`. They need torch and transformers alone, and name tensors as the trainer does.

Shapes: B sequences, T tokens, D width, E experts, K experts per token, V vocabulary, N patches, p side of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dsmoe_vl.pretrained.own_code.vision_dsmoe_vl import (
    Attention,
    Connector,
    RMSNorm,
    SwiGLU,
    VisionEncoder,
    rotation,
)

_TEXT, _IMAGE = 0, 1  # rows of the routers' modality bias


class DsmoeVLConfig(PretrainedConfig):  # type: ignore[misc]
    """The `_table`s are those of the trainer's recipe. `experts`: of each sparse layer. `task`: the row of the routers'
    task bias, of `tasks`. `rope_frequencies`: radians a position, d / 2; `rope_magnitude`: of cosines and sines."""

    model_type = "dsmoe_vl"

    def __init__(
        self, model_table: dict[str, Any] | None = None, moe_table: dict[str, Any] | None = None,
        vision_table: dict[str, Any] | None = None, experts: list[int] | None = None, vocab_size: int = 0,
        tasks: int = 0, task: int = 0, image_token_id: int = 0, rope_frequencies: list[float] | None = None,
        rope_magnitude: float = 1.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        model = model_table or {}
        self.model_table, self.moe_table, self.vision_table = model, moe_table or {}, vision_table or {}
        self.experts, self.tasks, self.task = experts or [], tasks, task
        self.vocab_size, self.image_token_id = vocab_size, image_token_id
        self.rope_frequencies, self.rope_magnitude = rope_frequencies or [], rope_magnitude
        if model:  # the names by which transformers sizes its cache
            self.hidden_size, self.num_hidden_layers = model["width"], model["layers"]
            self.num_attention_heads, self.num_key_value_heads = model["heads"], model["kv_heads"]
            self.head_dim = model["head_width"] or model["width"] // model["heads"]
        kwargs["tie_word_embeddings"] = False  # `model_table` says it: there is no second tensor then
        super().__init__(**kwargs)


class Router(nn.Module):
    """Chooses experts by token, task and modality, as `moe["routing"]` says."""

    def __init__(self, config: DsmoeVLConfig, experts: int) -> None:
        super().__init__()
        self.task, self.moe = config.task, config.moe_table
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.task_bias = nn.Parameter(torch.empty(config.tasks, experts))
        self.modality_bias = nn.Parameter(torch.empty(3, experts))
        self.selection_bias = nn.Parameter(torch.empty(experts), requires_grad=False)

    def forward(self, x: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D], modality int64 [T] -> experts int64 and gates float32, [T, K] each."""
        routing, count = self.moe["routing"], len(self.weight)
        logits = F.linear(x.float(), self.weight.float())
        task = self.task_bias[self.task].float()
        if routing == "task":
            logits = task.expand_as(logits)
        elif routing != "plain":
            logits = logits + task + self.modality_bias.float()[modality]
        others = torch.zeros_like(logits, dtype=torch.bool)
        if routing == "isolated":
            others = torch.arange(count, device=x.device) * 3 // count != modality.unsqueeze(-1)
        probabilities = logits.masked_fill(others, float("-inf")).softmax(dim=-1)
        scores = (probabilities + self.selection_bias.float()).masked_fill(others, float("-inf"))
        experts = scores.topk(self.moe["top_k"], dim=-1).indices
        gates = probabilities.gather(-1, experts)
        if self.moe["renormalise"] and self.moe["top_k"] > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        return experts, gates


class Expert(nn.Module):
    """`w2(silu(w1 x) * w3 x)`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Parameter(torch.empty(hidden, width)), nn.Parameter(torch.empty(hidden, width))
        self.w2 = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """[R, D] -> [R, D]."""
        return F.linear(F.silu(F.linear(x, self.w1)) * F.linear(x, self.w3), self.w2)


class SparseFeedForward(nn.Module):
    """Router, experts and an optional shared expert."""

    def __init__(self, config: DsmoeVLConfig, experts: int) -> None:
        super().__init__()
        moe, width = config.moe_table, config.hidden_size
        self.router = Router(config, experts)
        self.experts = nn.ModuleList(Expert(width, moe["ffn_width"]) for _ in range(experts))
        shared = moe["shared_ffn_width"]
        self.shared = SwiGLU(width, shared, moe["shared_gate"]) if shared else None

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        """x [B, T, D], modality int64 [B, T] -> [B, T, D]."""
        rows = x.flatten(0, 1)
        experts, gates = self.router(rows, modality.flatten())
        out = torch.zeros_like(rows) if self.shared is None else self.shared(rows)
        for number, expert in enumerate(self.experts):
            token, choice = (experts == number).nonzero(as_tuple=True)
            if len(token):
                share = gates[token, choice].unsqueeze(-1).to(rows.dtype)
                out = out.index_add(0, token, expert(rows[token]) * share)
        return out.view_as(x)


class DecoderLayer(nn.Module):
    """Causal attention, then a dense or sparse feed-forward."""

    def __init__(self, config: DsmoeVLConfig, index: int) -> None:
        super().__init__()
        model, dense = config.model_table, config.moe_table["first_dense_layers"]
        width, eps = model["width"], model["norm_eps"]
        self.attention_norm, self.feed_forward_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.attention = Attention(
            width, model["heads"], model["kv_heads"], config.head_dim, model["qk_norm"], eps, model["qkv_bias"], False,
            index,
        )  # fmt: skip
        self.sparse = index >= dense
        self.feed_forward: nn.Module = (
            SparseFeedForward(config, config.experts[index - dense])
            if self.sparse
            else SwiGLU(width, model["ffn_width"])
        )

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor, modality: Tensor, cache: Any) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), turns, mask, cache)
        inner = self.feed_forward_norm(x)
        return x + (self.feed_forward(inner, modality) if self.sparse else self.feed_forward(inner))


class DsmoeVLForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The whole model. A picture stands in a prompt as one `image_token_id` for each of its cells."""

    config_class = DsmoeVLConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _no_split_modules = ("DecoderLayer", "VisionLayer")

    def __init__(self, config: DsmoeVLConfig) -> None:
        super().__init__(config)
        model = config.model_table
        self.vision = VisionEncoder(config.vision_table)
        self.connector = Connector(config.vision_table, model["width"])
        self.embedding = nn.Embedding(config.vocab_size, model["width"])
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(model["layers"]))
        self.norm = RMSNorm(model["width"], model["norm_eps"])
        self.head = None if model["tied"] else nn.Linear(model["width"], config.vocab_size, bias=False)
        if any("selection_bias" in name for name, _ in self.named_parameters()):
            self._keep_in_fp32_modules_strict = {"selection_bias"}  # its steps are smaller than those of bfloat16
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every tensor is in the files."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The output projection, if it is not the embedding."""
        return self.head

    def image_features(self, pixel_values: Tensor, spatial_shapes: Tensor) -> Tensor:
        """The cells of all pictures, [Q, D]. pixel_values [pictures, N at most, p * p * 3]; spatial_shapes int64
        [pictures, 2], the rows and columns of patches."""
        found = []
        for patches, (rows, columns) in zip(pixel_values, spatial_shapes.tolist(), strict=True):
            found.append(self.connector(self.vision(patches[: rows * columns], rows, columns), rows, columns))
        return torch.cat(found)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, pixel_values: Tensor | None = None, spatial_shapes: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """input_ids, attention_mask int64 [B, T] -> logits [B, T, V]; with labels int64 [B, T] (-100: none) the loss.
        logits_to_keep: of the last positions only; 0: of all."""
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        x, length = self.embedding(input_ids), input_ids.shape[1]
        is_cell = input_ids == self.config.image_token_id
        if pixel_values is not None:
            if spatial_shapes is None:
                raise ValueError("pixel_values need spatial_shapes: the rows and columns of each picture's patches")
            cells = self.image_features(pixel_values, spatial_shapes)
            if len(cells) != int(is_cell.sum()):
                raise ValueError(f"{int(is_cell.sum())} image tokens, but the pictures have {len(cells)} cells")
            replaces = self.config.vision_table["placeholder"] == "replace"
            x = x.masked_scatter(is_cell.unsqueeze(-1), cells.to(x.dtype) + (0 if replaces else x[is_cell]))
        real = torch.ones(len(x), before + length, dtype=torch.bool, device=x.device)
        if attention_mask is not None:
            real = attention_mask.bool()
        if position_ids is None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
        places = torch.arange(before + length, device=x.device)
        # A position sees itself even where it is padding: a row that sees nothing has no softmax.
        own = places[before:, None] == places
        mask = ((places[before:, None] >= places) & real[:, None] | own).unsqueeze(1)
        slow = torch.tensor(self.config.rope_frequencies, device=x.device)
        turns = rotation(position_ids.float().unsqueeze(-1) * slow, self.config.rope_magnitude)
        modality = torch.where(is_cell, _IMAGE, _TEXT)
        for layer in self.layers:
            x = layer(x, turns, mask, modality, past_key_values)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(self.norm(x)[:, -logits_to_keep:], weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Pictures go in with the prompt; later steps have the new tokens alone."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            for name in ("pixel_values", "spatial_shapes", "pixel_attention_mask"):
                inputs.pop(name, None)
        return inputs
