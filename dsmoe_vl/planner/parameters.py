"""Parameter counts of a recipe's model, by part.

Symbols: D decoder width, H heads, Hkv key/value heads, d = D / H, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_vl.config.recipe import ModelConfig, MoEConfig, Recipe, VisionConfig, learned_tasks
from dsmoe_vl.config.task_table import TASKS

PLACE_AND_TIME_FEATURES = 64  # sinusoids of a cell's place and time, inputs of the connector
_MODALITIES = 3  # rows of the router's modality bias; its task bias has one row per task


@dataclass(frozen=True)
class ParameterCounts:
    """Trainable parameters of each part. The output projection is the token embedding and counts once."""

    vision: int
    connector: int
    embedding: int
    attention: int  # of the decoder, QK-norms included
    dense_ffn: int  # the dense decoder layers' feed-forwards
    routers: int
    experts: int  # all routed experts
    shared_experts: int
    residual_experts: int  # PR-MoE: one more expert and its mixing weights per layer
    norms: int  # of the decoder
    heads: int  # of the tasks
    active_experts: int  # the part of `experts` that one token uses: K of E

    @property
    def total(self) -> int:
        """Every trainable parameter."""
        return (
            self.vision
            + self.connector
            + self.embedding
            + self.attention
            + self.dense_ffn
            + self.routers
            + self.experts
            + self.shared_experts
            + self.residual_experts
            + self.norms
            + self.heads
        )

    @property
    def active(self) -> int:
        """Parameters used by one token: K instead of E experts per layer."""
        return self.total - self.experts + self.active_experts


def sparse_layers(recipe: Recipe) -> int:
    """Decoder layers whose feed-forward is MoE."""
    return recipe.model.layers - recipe.moe.first_dense_layers


def experts_of_layers(recipe: Recipe) -> tuple[int, ...]:
    """E of every MoE layer."""
    return recipe.moe.experts_per_layer or (recipe.moe.experts,) * sparse_layers(recipe)


def count_parameters(recipe: Recipe) -> ParameterCounts:
    """The parameters of the model that `recipe` describes."""
    model, moe = recipe.model, recipe.moe
    width, sparse, all_experts = model.width, sparse_layers(recipe), sum(experts_of_layers(recipe))
    return ParameterCounts(
        vision=_vision(model.vision),
        connector=_connector(model.vision, width),
        embedding=recipe.tokenizer.vocab_size * width * (1 if model.tied else 2),
        attention=model.layers * _decoder_attention(model),
        dense_ffn=moe.first_dense_layers * _swiglu(width, model.ffn_width),
        routers=all_experts * (width + len(TASKS) + _MODALITIES),
        experts=_experts(moe, width, all_experts),
        shared_experts=sparse * (_swiglu(width, moe.shared_ffn_width) + width * moe.shared_gate),
        residual_experts=sparse * (_experts(moe, width, 1) + 2 * width + 2) if moe.residual else 0,
        norms=(2 * model.layers + 1) * width,
        heads=sum(spec.head_parameters(getattr(recipe.tasks, spec.name), width) for spec in learned_tasks(recipe)),
        active_experts=_experts(moe, width, sparse * moe.top_k),
    )


def _swiglu(width: int, hidden: int) -> int:
    return 3 * width * hidden


def _experts(moe: MoEConfig, width: int, experts: int) -> int:
    return experts * _swiglu(width, moe.ffn_width)


def _decoder_attention(model: ModelConfig) -> int:
    """q and o: D x (H d); k and v: D x (G d); biases of q, k and v; weights of the QK-norm."""
    queries, keys = (heads * model.width_of_head for heads in (model.heads, model.kv_heads))
    norms = {"head": 2 * model.width_of_head, "width": queries + keys, "none": 0}[model.qk_norm]
    return 2 * model.width * (queries + keys) + (queries + 2 * keys) * model.qkv_bias + norms


def _vision(vision: VisionConfig) -> int:
    width = vision.width
    patch_embedding = 3 * vision.patch_size**2 * width + width
    norm = width if vision.norm == "rms" else 2 * width
    attention = 4 * width**2 + 4 * width * vision.bias + 2 * (width // vision.heads) * vision.qk_norm
    feed_forward = _swiglu(width, vision.ffn_width)
    if vision.ffn != "swiglu":
        feed_forward = 2 * width * vision.ffn_width + vision.ffn_width + width
    layer = 2 * norm + attention + feed_forward + 2 * width * vision.layer_scale
    table = (vision.position_grid**2 if "learned" in vision.positions else 0) + vision.prefix_tokens
    return patch_embedding + vision.layers * layer + (vision.pre_norm + vision.final_norm) * norm + table * width


def _connector(vision: VisionConfig, width: int) -> int:
    cell = vision.merge**2 * vision.width
    norm = {"none": 0, "patch": 2 * vision.width, "joined": 2 * cell}[vision.connector_norm]
    place_and_time = PLACE_AND_TIME_FEATURES * width if vision.place_and_time else 0
    return norm + (cell * width + width) + (width * width + width) + place_and_time
