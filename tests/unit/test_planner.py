"""Parameter, FLOP and memory arithmetic: against the model itself, and against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsmoe_vl.config.model import ModelConfig, MoEConfig, VisionConfig
from dsmoe_vl.config.recipe import DataConfig, LoraConfig, Recipe, RunConfig, TokenizerConfig
from dsmoe_vl.planner.counts import count_parameters
from dsmoe_vl.planner.flops import estimate_flops, full_step_flops
from dsmoe_vl.planner.memory import estimate_memory
from dsmoe_vl.planner.parameters import tensors
from dsmoe_vl.planner.trained import count_trained
from dsmoe_vl.tasks.registry import build_backbone
from tests.support.shipped import RECIPES, shipped

TINY = Recipe(
    model=ModelConfig(
        width=8,
        layers=3,
        heads=2,
        kv_heads=1,
        ffn_width=10,
        vision=VisionConfig(patch_size=2, merge=2, width=4, layers=1, heads=1, ffn_width=6),
    ),
    moe=MoEConfig(experts=4, top_k=2, ffn_width=5, shared_ffn_width=7, first_dense_layers=1),
    data=DataConfig(pack_length=32, pack_patches=64, image_max_patches=16),
    tokenizer=TokenizerConfig(vocab_size=11),
)


def tiny(name: str, moe: dict | None = None, **model: object) -> Recipe:
    """TINY with other settings, under a name for the test."""
    changed = replace(TINY, model=replace(TINY.model, **model), moe=replace(TINY.moe, **(moe or {})))
    return replace(changed, run=RunConfig(name=name))


def tower(**settings: object) -> VisionConfig:
    """TINY's with other settings."""
    return replace(TINY.model.vision, **settings)


SWITCHED = [
    tiny("width of heads", head_width=6),
    tiny("norm over heads", head_width=6, qk_norm="width", kv_heads=2),
    tiny("no norm, biases", qk_norm="none", qkv_bias=True),
    tiny("untied", tied=False),
    tiny("tower like SigLIP", vision=tower(norm="layer", bias=True, qk_norm=False, ffn="gelu_tanh", positions="learned",
                                           position_grid=3, connector_norm="joined", place_and_time=False)),
    tiny("tower like DINOv2", vision=tower(norm="layer", bias=True, qk_norm=False, ffn="gelu", positions="learned",
                                           position_grid=3, prefix_tokens=5, layer_scale=True, connector_norm="patch")),
    tiny("tower like CLIP", vision=tower(norm="layer", bias=True, qk_norm=False, ffn="quick_gelu", pre_norm=True,
                                         positions="learned+rotary", position_grid=2, final_norm=False)),
    tiny("Qwen3-VL's connectors", rope_sections=(1, 1, 0), vision=tower(connector_norm="patch", connector_width=9,
                                                                        taps=(0,), placeholder="replace")),
    tiny("residual", moe={"backend": "capacity", "residual": True}),
    tiny("shared gate", moe={"shared_gate": True, "renormalise": False}),
]  # fmt: skip


LORA = LoraConfig(rank=3, parts=("vision", "attention", "feed_forward", "experts"))
ADAPTED = [
    replace(recipe, lora=LORA)
    for recipe in (
        tiny("adapters", qkv_bias=True, vision=tower(bias=True), moe={"shared_gate": True, "renormalise": False}),
        tiny("adapters, residual", vision=tower(ffn="gelu"), moe={"backend": "capacity", "residual": True}),
    )
]


@pytest.mark.parametrize(
    "recipe", [TINY, *SWITCHED, *ADAPTED, *map(shipped, RECIPES)], ids=lambda recipe: recipe.run.name
)
def test_parts_add_up_to_the_model(recipe):
    with torch.device("meta"):
        model = build_backbone(recipe)
    assert list(tensors(recipe).items()) == [(name, tuple(value.shape)) for name, value in model.named_parameters()]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = count_parameters(recipe)

    def of(*substrings: str) -> int:
        return sum(size for name, size in sizes.items() if any(part in name for part in substrings))

    assert counts.total == sum(sizes.values())
    assert counts.vision == of("vision.")
    assert counts.connector == of("connector.")
    assert counts.experts == of(".experts.")
    assert counts.routers == of(".router.")
    assert counts.shared_experts == of(".shared.")


def test_parameters_by_hand():
    counts = count_parameters(TINY)
    vision_layer = 2 * 4 + (4 * 4 * 4 + 2 * 4) + 3 * 4 * 6
    assert counts.vision == (12 * 4 + 4) + vision_layer + 4
    assert counts.connector == (16 * 8 + 8) + (8 * 8 + 8) + 64 * 8
    assert counts.embedding == 11 * 8
    assert counts.attention == 3 * (8 * 8 + 2 * (4 * 8) + 8 * 8 + 2 * 4)
    assert counts.dense_ffn == 3 * 8 * 10
    assert counts.routers == 2 * (4 * 8 + 3 * 4 + 3 * 4)
    assert counts.experts == 2 * 4 * 3 * 8 * 5
    assert counts.shared_experts == 2 * 3 * 8 * 7
    assert counts.norms == 3 * 2 * 8 + 8
    assert counts.total - counts.active == 2 * (4 - 2) * 3 * 8 * 5


def test_flops_by_hand():
    flops = estimate_flops(TINY, token_context=10, patch_context=16)
    attention = 3 * (2 * (8 * 8 + 2 * (4 * 8) + 8 * 8) + 4 * 8 * 10)
    feed_forward = 2 * 3 * 8 * 10 + 2 * 2 * (8 * 4 + 2 * 3 * 8 * 5 + 3 * 8 * 7)
    assert flops.per_token == attention + feed_forward
    assert flops.per_label == 2 * 8 * 11
    encoder = 2 * (12 * 4 + 4 * 4 * 4 + 3 * 4 * 6) + 4 * 4 * 16
    assert flops.per_patch == encoder + 2 * (16 * 8 + 8 * 8 + 64 * 8) / 4
    assert flops.training(5, 3, 2) == 3 * (5 * flops.per_token + 3 * flops.per_patch + 2 * flops.per_label)


def test_adapters_by_hand():
    adapted = replace(TINY, lora=LORA)
    counts, before = count_parameters(adapted), count_parameters(TINY)
    attention = 3 * 3 * ((8 + 16) + (8 + 8))
    dense, shared = 3 * ((8 + 20) + (10 + 8)), 2 * 3 * ((8 + 14) + (7 + 8))
    expert = 3 * 3 * (8 + 5)
    vision = 3 * ((4 + 12) + (4 + 4) + (4 + 12) + (6 + 4))
    assert counts.attention - before.attention == attention and counts.vision - before.vision == vision
    assert counts.experts - before.experts == 2 * 4 * expert
    assert counts.total - before.total == attention + dense + shared + 2 * 4 * expert + vision
    assert counts.active - before.active == attention + dense + shared + 2 * 2 * expert + vision
    trained = count_trained(adapted).trained
    assert [trained[part] for part in LORA.parts] == [vision, attention, dense + shared, 2 * 4 * expert]
    assert trained["embedding"] == before.embedding

    ours, theirs = (estimate_flops(recipe, token_context=10, patch_context=16) for recipe in (adapted, TINY))
    assert ours.per_token - theirs.per_token == 2 * (attention + dense + shared + 2 * 2 * expert)
    assert ours.per_patch - theirs.per_patch == 2 * vision
    frozen = 2 * (3 * (8 * 16 + 8 * 8) + 3 * 8 * 10 + 2 * 3 * 8 * 7 + 2 * 2 * 3 * 8 * 5)
    assert ours.spared_token == frozen and theirs.spared_token == 0


def test_default_contexts_are_those_of_one_full_picture():
    flops = estimate_flops(TINY)
    assert (flops.token_context, flops.patch_context) == (16 / 4 / 2, 16)


def test_full_step_has_labels_where_no_vision_token_stands():
    flops = estimate_flops(TINY)
    assert full_step_flops(TINY, flops, 3) == flops.training(3 * 32, 3 * 64, 3 * (32 - 16))


def memory(**settings):
    given = {"zero_stage": 2, "world_size": 4, "ep_size": 2, "bf16": True, "offload_optimizer": False}
    return estimate_memory(count_parameters(TINY), count_trained(TINY), **{**given, "offload_param": False, **settings})


def test_memory_by_hand():
    counts = count_parameters(TINY)
    held = counts.total - counts.experts / 2
    share = counts.total / 4
    assert memory(zero_stage=0).device == 16 * held
    assert memory(zero_stage=0, bf16=False).device == 16 * held
    assert memory(zero_stage=1).device == 4 * held + 12 * share
    assert memory(zero_stage=2).device == 2 * held + 14 * share
    assert memory(zero_stage=3).device == pytest.approx(16 * share)
    assert memory(zero_stage=2).host == 0


def test_offload_moves_memory_to_the_host():
    counts = count_parameters(TINY)
    moved = memory(offload_optimizer=True)
    assert (moved.optimizer, moved.gradients, moved.host) == (0, 0, 16 * counts.total / 4)
    everything = memory(zero_stage=3, offload_optimizer=True, offload_param=True)
    assert everything.device == 0 and everything.host == 18 * counts.total / 4
