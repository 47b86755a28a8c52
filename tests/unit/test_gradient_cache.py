"""Contrast over accumulation steps: every gradient as if all micro-steps were one big batch."""

from dataclasses import replace

import pytest
import torch

from dsmoe_vl.data.pack import collate
from dsmoe_vl.model.init import initialise
from dsmoe_vl.tasks.registry import build_backbone, build_tasks
from dsmoe_vl.tasks.task import MultiTaskModel
from dsmoe_vl.training.gradient_cache import cache_gradients, with_cached_gradients
from tests.distributed.train_losses import RECIPE
from tests.support.batches import mixed_pack

MICRO_STEPS = {
    "as many pairs": [[mixed_pack(0), mixed_pack(1)], [mixed_pack(2), mixed_pack(3)]],
    "unequal": [[mixed_pack(4)], [mixed_pack(5), mixed_pack(6), mixed_pack(7)], [mixed_pack(8)]],
    "none in the first": [[mixed_pack(0, ("retrieval",))], [mixed_pack(1)], [mixed_pack(2)]],
    "none in the last": [[mixed_pack(1)], [mixed_pack(2)], [mixed_pack(0, ("retrieval",))]],
    "none at all": [[mixed_pack(0, ("retrieval",))], [mixed_pack(1, ("retrieval",))]],
}


def build(loss, cached):
    """The whole tiny model with all tasks; it is its own engine, without DeepSpeed."""
    retrieval = replace(RECIPE.tasks.retrieval, loss=loss, gradient_cache=cached)
    recipe = replace(RECIPE, tasks=replace(RECIPE.tasks, retrieval=retrieval))
    backbone = build_backbone(recipe)
    initialise(backbone, seed=1)
    return MultiTaskModel(backbone, build_tasks(recipe, None))  # losses need no tokenizer


def gradients(model):
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def of_parts(model, batches, loss):
    """Sums of all terms over the micro-steps, and the gradients of their total. Without `loss` nothing is cached."""
    caches = cache_gradients(model, batches, loss) if loss else [None] * len(batches)
    sums = {}
    for batch, cache in zip(batches, caches, strict=True):
        output = model(batch)[0]
        if cache is not None:
            assert "retrieval" not in output.loss_sums
            output = with_cached_gradients(output, cache)
        torch.stack(list(output.loss_sums.values())).sum().backward()
        for name, value in output.loss_sums.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums, gradients(model)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("packs", MICRO_STEPS.values(), ids=MICRO_STEPS)
def test_micro_steps_equal_one_big_batch(loss, packs):
    big = collate([pack for micro_step in packs for pack in micro_step])
    expected_sums, expected = of_parts(build(loss, False), [big], None)
    model = build(loss, True)
    sums, found = of_parts(model, [collate(micro_step) for micro_step in packs], loss)
    assert model.training
    assert sums.keys() == expected_sums.keys()
    for name, value in expected_sums.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        difference = float((found[name] - gradient).abs().max()) / scale
        assert difference < 1e-5, f"{name}: {difference:.1e} of its largest gradient"
    learned = [f"backbone.retrieval.{name}" for name in ("media.weight", "text.weight", "log_scale")]
    if big.counts["retrieval"]:
        assert all(found[name].any() for name in learned)
        assert found["backbone.retrieval.bias"].any() == (loss == "sigmoid")


def test_without_the_cache_contrast_ends_at_the_micro_step():
    """The test above can tell."""
    packs = MICRO_STEPS["as many pairs"]
    big, _ = of_parts(build("info_nce", False), [collate([p for micro_step in packs for p in micro_step])], None)
    parts, _ = of_parts(build("info_nce", False), [collate(micro_step) for micro_step in packs], None)
    assert parts["retrieval"] < 0.9 * big["retrieval"]
    torch.testing.assert_close(parts["caption"], big["caption"])
