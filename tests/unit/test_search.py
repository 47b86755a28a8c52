"""The search against trying everything, and its JSON against the resolver."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.recipe import RECOMPUTED
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.cluster import cluster_of
from dsmoe_vl.planner.forecast import forecast
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.search import Point, describe_search, points, search
from tests.support.shipped import named
from tests.unit.test_layers import ROOT

DEEPSPEED = load_deepspeed(ROOT / "ds_configs/moe_offload.json") | {"train_batch_size": 64}


def resolved(deepspeed, recipe, ranks=8):
    return resolve(recipe, deepspeed, ranks, device="cuda", bf16_unit=True, strict=True)


@pytest.mark.parametrize(("backend", "gib"), [("dropless", 25), ("capacity", 140)])
def test_nothing_that_resolves_and_fits_is_faster(backend, gib):
    recipe = named("base")
    recipe = replace(recipe, moe=replace(recipe.moe, backend=backend))
    cluster = replace(cluster_of("h200"), memory_bytes=gib * 2.0**30)
    plan = resolved(DEEPSPEED, recipe)
    best, found = search(plan, cluster)[0]
    tried = 0
    grid = itertools.product(
        range(4), (1, 2, 4, 8), (1, 2, 4, 8), RECOMPUTED, ("nothing", "optimizer", "optimizer and weights")
    )
    for stage, ep_size, micro_batch, recompute, offload in grid:
        point = Point(stage, ep_size, micro_batch, 8 // micro_batch, recompute, offload)
        settings = point.settings(DEEPSPEED)
        try:
            other = forecast(resolved(settings, point.recipe(recipe)), cluster)
        except ConfigError:
            continue
        tried += 1
        assert other.time.total >= found.time.total or not other.fits
    assert tried == len(list(points(plan))) and found.fits
    again = forecast(resolved(best.settings(DEEPSPEED), best.recipe(recipe)), cluster)
    assert (again.time, again.memory) == (found.time, found.memory)
    assert again.plan.packs_per_step == plan.packs_per_step


def test_every_point_resolves_without_a_note():
    recipe = named("base")
    plan = resolved(DEEPSPEED, recipe)
    for point in points(plan):
        assert resolved(point.settings(DEEPSPEED), point.recipe(recipe)).notes == ()


def test_the_text_gives_the_best_few_and_reasons():
    plan, cluster = resolved(DEEPSPEED, named("base")), cluster_of("h200")
    text = describe_search(plan, cluster, search(plan, cluster))
    assert "  5." in text and "why the first" in text and "EP 8" in text and "recomputed" in text


def test_a_model_that_fits_nowhere():
    plan = resolved(DEEPSPEED, named("large"))
    with pytest.raises(ConfigError, match=r"nothing fits into 1\.00 GiB of .*the least is .* a rank with ZeRO-3"):
        search(plan, replace(cluster_of("h200"), memory_bytes=2.0**30))


def test_expert_sizes_divide_every_layer():
    recipe = named("base")
    recipe = replace(recipe, moe=replace(recipe.moe, experts_per_layer=(16,) * 7 + (24,) * 7 + (32,)))
    plan = resolved(DEEPSPEED | {"expert_parallel": {"enabled": True, "autoep_size": 8}}, recipe)
    assert {point.ep_size for point in points(plan)} == {1, 2, 4, 8} and math.gcd(16, 24, 32) == 8
