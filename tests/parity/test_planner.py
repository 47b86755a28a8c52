"""The planner's counts against a real model: FLOPs as torch counts them, and the tensors that autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsmoe_vl.config.recipe import RECOMPUTED, Recipe
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.data.segment import IGNORE
from dsmoe_vl.model import attention
from dsmoe_vl.planner.activations import activations
from dsmoe_vl.planner.flops import estimate_flops
from dsmoe_vl.planner.products import Shape
from dsmoe_vl.tasks.registry import build_backbone
from tests.support.shipped import named
from tests.support.simple_batch import PICTURES, picture_segment

BASE = named("quickstart")
VARIANTS = {
    "quickstart": BASE,
    "many experts": replace(BASE, moe=replace(BASE.moe, experts=16, top_k=4, shared_ffn_width=64)),
    "deep": replace(BASE, model=replace(BASE.model, layers=6)),
    "tall tower": replace(BASE, model=replace(BASE.model, vision=replace(BASE.model.vision, layers=6))),
    "dense": replace(BASE, moe=replace(BASE.moe, first_dense_layers=BASE.model.layers)),
}


def batch_of(recipe: Recipe) -> tuple[Batch, Shape]:
    """One pack of equal segments, without padding: each a picture and a text."""
    segment = picture_segment(recipe.model.vision)
    vision = recipe.model.vision
    count = PICTURES
    patches = count * len(segment.pictures[0].patches)
    shape = PackShape(count * segment.length, patches, vision.patch_size, vision.merge)
    batch = collate([assemble([segment] * count, shape)])
    labels = int((batch.labels != IGNORE).sum())
    return batch, Shape(len(batch.tokens), len(batch.patches), labels)


def loss(model, batch):
    hidden, _ = model(batch)
    rows = (batch.labels != IGNORE).nonzero().squeeze(1)
    return model.head(hidden[rows], batch.labels[rows])


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_are_those_that_torch_counts(name, monkeypatch):
    """Within 2 %: the input of the encoder needs no gradient. The reference attention computes what the mask hides."""
    monkeypatch.setattr(attention, "has_attention", lambda x: False)  # torch counts its own operators alone
    recipe = VARIANTS[name]
    batch, shape = batch_of(recipe)
    segment = shape.tokens / PICTURES
    flops = estimate_flops(recipe, token_context=segment, patch_context=shape.patches / PICTURES)
    model = build_backbone(recipe)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            value = loss(model, batch)
        with FlopCounterMode(display=False) as backward:
            value.backward()
    ours = shape.tokens * flops.per_token + shape.patches * flops.per_patch + shape.labels * flops.per_label
    assert forward.get_total_flops() == pytest.approx(ours, rel=0.02)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(flops.training(shape.tokens, shape.patches, shape.labels), rel=0.02)


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("name", VARIANTS)
def test_activations_are_what_autograd_keeps(name, recompute):
    recipe = VARIANTS[name]
    batch, shape = batch_of(recipe)
    model = build_backbone(recipe, recompute)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = model(batch)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    ours = activations(recipe, replace(shape, labels=0), bf16=False, cuda=False, recompute=recompute).kept
    assert hidden.requires_grad and ours == pytest.approx(counted, rel=0.1)
