"""The cost model: sums by hand on tiny shapes, and what must hold for any cluster."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import combinations

import pytest

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.activations import activations
from dsmoe_vl.planner.campaign import best_interval, campaign, lost_share
from dsmoe_vl.planner.cluster import cluster_of
from dsmoe_vl.planner.communication import (
    Group,
    all_reduce,
    all_to_all,
    data_group,
    expert_data_group,
    expert_group,
    gather,
)
from dsmoe_vl.planner.flops import estimate_flops
from dsmoe_vl.planner.forecast import describe_forecast, forecast
from dsmoe_vl.planner.products import Shape, attention_flops, exchanged_rows, products
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.run_memory import checkpoint_bytes, run_memory
from dsmoe_vl.planner.step_time import busiest_rank, step_time
from tests.support.shipped import RECIPES, named, shipped
from tests.unit.test_layers import ROOT
from tests.unit.test_planner import TINY

# Round figures: 1 TFLOP/s of products, 1 GB/s of everything else, no latencies.
ROUND = replace(
    cluster_of("h200"), accelerators=4, peak_flops=2e12, product_share=0.5, attention_share=0.5, memory_bandwidth=1e9,
    memory_share=1.0, reserved_bytes=0.0, fragmentation=0.15, operator_seconds=0.0,
    link_bandwidth=4e9, link_share=1.0, link_latency=0.0, network_bandwidth=1e9, network_share=1.0, network_latency=0.0,
)  # fmt: skip

SOURCES = (SourceConfig.at("images"),)
TINY = replace(
    TINY,
    data=replace(TINY.data, frame_max_patches=8),
    tokenizer=replace(TINY.tokenizer, path="tokenizer.model"),
)


def plan(recipe=TINY, ranks=4, **changes):
    deepspeed = load_deepspeed(ROOT / "ds_configs/moe.json") | changes
    data = replace(recipe.data, lanes=ranks * max(recipe.data.workers, 1), sources=SOURCES)
    recipe = replace(recipe, data=data)
    return resolve(recipe, deepspeed, ranks, device="cuda", bf16_unit=True)


@pytest.mark.parametrize("recipe", [TINY, *map(shipped, RECIPES)], ids=lambda recipe: recipe.run.name)
@pytest.mark.parametrize("ep_size", [1, 2])
def test_products_and_attention_are_the_flops_of_the_plan(recipe, ep_size):
    shape, flops = Shape(640, 320, 30, ep_size), estimate_flops(recipe)
    ours = sum(product.flops for product in products(recipe, shape)) + attention_flops(recipe, shape, flops)
    assert ours == pytest.approx(640 * flops.per_token + 320 * flops.per_patch + 30 * flops.per_label, rel=1e-12)


def test_collectives_by_hand():
    inside, between = Group(4, 4), Group(8, 4)
    assert all_to_all(4e9, inside, ROUND) == pytest.approx(3 / 4)  # three quarters leave, at 4 GB/s
    assert all_to_all(4e9, between, ROUND) == pytest.approx(2.0)  # half of it leaves the node, at 1 GB/s
    assert gather(4e9, inside, ROUND) == pytest.approx(3 / 4)
    assert gather(16e9, between, ROUND) == pytest.approx(3.5)  # 14 of 16 GB at 4 GB/s; between nodes 8 at 4 x 1 GB/s
    assert gather(16e9, Group(8, 1), ROUND) == pytest.approx(14.0)  # one rank a node: 7 of 8 parts at 1 GB/s
    assert all_reduce(4e9, inside, ROUND) == 2 * gather(4e9, inside, ROUND)
    assert gather(4e9, Group(1, 1), ROUND) == all_to_all(4e9, Group(1, 1), ROUND) == 0


def test_groups():
    assert data_group(16, ROUND) == Group(16, 4) and data_group(16, ROUND).nodes == 4
    assert expert_group(2, ROUND) == Group(2, 2) and expert_group(8, ROUND) == Group(8, 4)
    assert expert_data_group(16, 2, ROUND) == Group(8, 2) and expert_data_group(16, 8, ROUND) == Group(2, 1)


def test_activations_by_hand():
    """A decoder of one dense layer, without pictures."""
    recipe = replace(TINY, model=replace(TINY.model, layers=1))
    found = activations(recipe, Shape(10, 0, 3), bf16=True, cuda=True, recompute="none")
    attention = (8 + 4) * 2 + (3 * 8 + 3 * 4) * 2 + 4 * 2
    layer = attention + 4 * 8 * 2 + 4 * 10 * 2
    assert found.kept == 10 * layer + 10 * (2 * 8 * 2 + 16 * 8) + 3 * 8 * 2
    assert found.logits == 3 * 11 * 14 and found.recomputed == 0 and found.gradients == 5 * layer
    assert found.total == found.kept + max(5 * layer, 3 * 11 * 14)
    again = activations(recipe, Shape(10, 0, 3), bf16=True, cuda=True, recompute="decoder")
    assert again.kept == found.kept - 10 * layer + 10 * 8 * 2 and again.recomputed == 10 * layer


def test_step_by_hand():
    """One rank, EP 1, ZeRO-0: nothing is sent; products are slower to move than to compute."""
    single = plan(ranks=1, zero_optimization={"stage": 0}, expert_parallel={"enabled": True, "autoep_size": 1})
    shape = Shape.full(TINY, 1, 1)
    time = step_time(single, ROUND, shape=shape)
    assert time.products == pytest.approx(3 * sum(p.times * p.moved(2) / 1e9 for p in products(TINY, shape)))
    assert time.attention == pytest.approx(3.5 * attention_flops(TINY, shape, single.flops) / 1e12)
    assert time.optimizer == pytest.approx(36 * single.parameters.total / 1e9)
    assert time.all_to_all == time.zero == time.expert_imbalance == time.pack_imbalance == time.host == 0
    assert time.total == sum(getattr(time, item.name) for item in fields(time))


def test_zero_by_hand():
    counts = plan().parameters
    dense, experts = 2.0 * (counts.total - counts.experts), 2.0 * counts.experts / 2
    ours, theirs = (
        3 / 4 / 4e9,
        1 / 2 / 4e9,
    )  # seconds a byte, over all four ranks and over the two with the same experts
    once = dense * ours + experts * theirs
    of_stage = {stage: step_time(plan(zero_optimization={"stage": stage}, gradient_accumulation_steps=3), ROUND).zero
                for stage in (0, 1, 2)}  # fmt: skip
    assert of_stage == pytest.approx({0: 2 * once, 1: 2 * once, 2: 4 * once})
    eager = plan(zero_optimization={"stage": 3, "overlap_comm": False}, gradient_accumulation_steps=3)
    assert step_time(eager, ROUND).zero == pytest.approx(9 * once)
    assert step_time(plan(zero_optimization={"stage": 3}), ROUND).zero == 0  # hidden


@pytest.mark.parametrize("name", ["a100", "mi300x"])
@pytest.mark.parametrize("stage", [2, 3])
def test_faster_hardware_is_never_slower(name, stage):
    wide = {"enabled": True, "autoep_size": 16}
    large = plan(named("large"), 64, zero_optimization={"stage": stage}, expert_parallel=wide)
    cluster = cluster_of(name)
    before = step_time(large, cluster).total
    for field in (
        "peak_flops", "product_share", "attention_share", "memory_bandwidth", "memory_share", "link_bandwidth",
        "network_bandwidth", "host_bandwidth", "patches_per_second",
    ):  # fmt: skip
        for factor in (1.01, 1.1):
            assert step_time(large, replace(cluster, **{field: getattr(cluster, field) * factor})).total <= before, (
                field
            )
    for field in ("operator_seconds", "link_latency", "network_latency"):
        assert step_time(large, replace(cluster, **{field: 0.0})).total <= before, field


def test_ranks_wait_for_the_fullest_pack():
    alone = {"enabled": True, "autoep_size": 1}
    cluster = replace(cluster_of("h200"), operator_seconds=0.0)  # else the host is slower than the fullest pack
    waits = [step_time(plan(named("base"), ranks, expert_parallel=alone), cluster).pack_imbalance
             for ranks in (1, 8, 64, 4096)]  # fmt: skip
    assert waits[0] == 0 < waits[1] <= waits[2] <= waits[3]
    many = plan(named("base"), 16384)  # so many that one pack is full
    full = replace(Shape.typical(many.recipe, 1, 2), patches=many.recipe.data.pack_patches)
    longest, typical = step_time(many, cluster, shape=full), step_time(many, cluster)
    together = sum(getattr(typical, name) for name in ("products", "attention", "memory_traffic", "host"))
    assert together + typical.pack_imbalance == pytest.approx(
        longest.products + longest.attention + longest.memory_traffic + longest.host
    )


def test_imbalance_grows_with_ranks_up_to_one_expert_a_rank():
    recipe = named("large")
    loads = [busiest_rank(recipe, size, 0.5) for size in (1, 2, 8, 64, 128)]
    assert loads[0] == 0 and loads == sorted(loads) and loads[-1] == pytest.approx(0.5)


def test_memory_by_hand():
    planned, cluster = plan(), ROUND
    found, states = run_memory(planned, cluster), planned.memory
    assert (found.weights, found.gradients, found.optimizer) == (states.weights, states.gradients, states.optimizer)
    kept = activations(TINY, replace(Shape.full(TINY, 1, 2), labels=32), bf16=True, cuda=True, recompute="none")
    assert found.activations + found.logits == kept.total
    exchanged = exchanged_rows(TINY.moe, TINY.moe.experts, 2)
    assert found.buffers == pytest.approx(2 * (32 * exchanged * 8 * 2) + planned.parameters.total * 2)
    assert found.fragmentation == pytest.approx(0.15 * (kept.total + found.buffers))
    assert found.host_snapshot == checkpoint_bytes(planned) / 4 == 14 * planned.parameters.total / 4
    assert not found.fits(replace(cluster, memory_bytes=found.device - 1))
    assert found.fits(replace(cluster, memory_bytes=found.device + 1))


@pytest.mark.parametrize(("experts", "top_k", "ep_size"), [(4, 2, 2), (6, 3, 3), (8, 1, 4), (6, 5, 2), (6, 6, 3)])
def test_exchanged_rows_against_all_choices(experts, top_k, ep_size):
    moe = replace(TINY.moe, experts=experts, top_k=top_k)
    choices = list(combinations(range(experts), top_k))
    ranks = sum(len({expert * ep_size // experts for expert in choice}) for choice in choices)
    assert exchanged_rows(moe, experts, ep_size) == pytest.approx(ranks / len(choices))


def test_best_interval_against_a_fine_search():
    for save, between in ((1.0, 1e4), (30.0, 5e3), (300.0, 2e4)):
        losses = {
            every: lost_share(every, save, 0.0, 0.0, between) for every in [save * 1.02**n for n in range(1, 600)]
        }
        best = min(losses, key=losses.__getitem__)
        assert lost_share(best_interval(save, between), save, 0.0, 0.0, between) <= losses[best] * 1.02
        assert best_interval(save, between) == pytest.approx(math.sqrt(2 * save * between), rel=0.1)
    assert best_interval(1.0, math.inf) == math.inf


def test_a_campaign_by_hand():
    planned = plan()
    cluster = replace(ROUND, storage_bandwidth=1e3, host_bandwidth=1e6, failures_per_day=0.0)
    found = campaign(planned, cluster, 2.0, tokens=planned.tokens_per_step * 10.5)
    assert found.steps == 11 and found.seconds == 22.0 and found.failures == 0
    assert found.save_seconds == pytest.approx(14 * planned.parameters.total / 1e3)
    often = campaign(planned, replace(cluster, failures_per_day=0.1), 2.0)
    assert often.failure_seconds == 86400 / 0.4 and often.lost_share > found.lost_share


def test_the_text_names_every_part_and_what_does_not_fit():
    found = forecast(plan(), ROUND)
    text = describe_forecast(found)
    assert all(word in text for word in ("all to all", "fragmentation", "MFU", "lost work"))
    small = describe_forecast(forecast(plan(), replace(ROUND, memory_bytes=1e5)))
    assert "fits into" in text and "DOES NOT FIT INTO 0.1 MiB" in small


def test_a_cluster_of_another_device_is_refused():
    with pytest.raises(ConfigError, match="the plan is for cuda"):
        forecast(plan(), replace(ROUND, device="cpu"))
