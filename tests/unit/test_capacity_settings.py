"""The capacity backend before a model exists: what is refused, with value, key, file and fix; what is counted."""

from __future__ import annotations

import pytest
import torch

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.objective.objective import load_fractions, uniform_load
from dsmoe_vl.planner.counts import count_parameters
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.flops import estimate_flops
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.tasks.registry import build_backbone
from tests.unit.test_resolve import moe, plan, quickstart

CAPACITY = "moe.backend=capacity"  # the quickstart has 4 layers, the first dense, 8 experts, top_k 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["moe.backend=dense"], ["moe.backend = 'dense'", "dropless, capacity"]),
        (["moe.capacity_factor=1.5"], ["moe.capacity_factor = 1.5", '"dropless"', '"capacity"', "leave", "1.25"]),
        (["moe.eval_capacity_factor=1"], ["moe.eval_capacity_factor = 1.0", "no effect"]),
        (["moe.min_capacity=8"], ["moe.min_capacity = 8", "no effect"]),
        (["moe.drop_tokens=false"], ["moe.drop_tokens = False", "no effect"]),
        (["moe.random_token_selection=true"], ["moe.random_token_selection = True", "no effect"]),
        (["moe.noisy_gate=Jitter"], ["moe.noisy_gate = 'Jitter'", "no effect"]),
        (["moe.residual=true"], ["moe.residual = True", "no effect"]),
        ([CAPACITY, "moe.capacity_factor=0"], ["moe.capacity_factor = 0.0", "above 0"]),
        ([CAPACITY, "moe.min_capacity=-1"], ["moe.min_capacity = -1", "negative"]),
        ([CAPACITY, "moe.noisy_gate=Gumbel"], ["moe.noisy_gate = 'Gumbel'", '"RSample" or "Jitter"']),
        ([CAPACITY, "moe.noisy_gate=RSample"], ["moe.noisy_gate = 'RSample'", "moe.top_k = 1", "not 2"]),
        ([CAPACITY, "moe.random_token_selection=true"], ["moe.random_token_selection = True", "moe.top_k = 1"]),
        (
            [CAPACITY, "moe.drop_tokens=false", "moe.capacity_factor=2"],
            ["moe.capacity_factor = 2.0", "moe.drop_tokens = false"],
        ),
        (["moe.experts_per_layer=[4,8]"], ["moe.experts_per_layer = (4, 8)", "2 numbers", "3 layers"]),
        (["moe.experts_per_layer=[4,4,16]"], ["moe.experts = 8", "set it to 16"]),
        (["moe.experts_per_layer=[1,4,8]"], ["moe.top_k = 2", "at most 1", "[1, 4, 8]"]),
        (["moe.experts_per_layer=[0,4,8]"], ["moe.experts_per_layer = (0, 4, 8)", "at least 1"]),
        (["moe.experts_per_layer=[4,5,8]", "moe.routing=isolated"], ["moe.routing = 'isolated'", "1 of 4 experts"]),
        (
            [CAPACITY, "tasks.retrieval.weight=1", "tasks.retrieval.gradient_cache=true"],
            ["tasks.retrieval.gradient_cache = True", "moe.eval_capacity_factor", "1.25"],
        ),
    ],
)
def test_settings_that_would_not_work_are_named(overrides, expected):
    with pytest.raises(ConfigError) as raised:
        plan(quickstart(*overrides))
    for part in ["my.toml", *expected]:
        assert part in str(raised.value)


@pytest.mark.parametrize("value", ["4", '["4"]'])
def test_experts_per_layer_are_whole_numbers(value):
    with pytest.raises(ConfigError, match=r"moe\.experts_per_layer.*whole number"):
        quickstart(f"moe.experts_per_layer={value}")


def test_zero_3_is_refused_before_a_model_exists():
    config = moe(zero_optimization={"stage": 3})
    with pytest.raises(ConfigError, match=r'stage = 3 in my\.json.*"capacity" in my\.toml.*to 2, or.*"dropless"'):
        plan(quickstart(CAPACITY), config)
    assert plan(quickstart(), config).zero_stage == 3


@pytest.mark.parametrize("overrides", [
    (), ("moe.drop_tokens=false",), ("moe.noisy_gate=Jitter", "moe.residual=true"), ("moe.experts_per_layer=[4,4,8]",),
    ("moe.top_k=1", "moe.noisy_gate=RSample", "moe.random_token_selection=true"),
    ("tasks.retrieval.weight=1", "tasks.retrieval.gradient_cache=true", "moe.eval_capacity_factor=1.25"),
])  # fmt: skip
def test_settings_that_work(overrides):
    found = plan(quickstart(CAPACITY, *overrides))
    assert "(capacity)" in describe(found) and found.notes == ()


def test_the_plan_tells_the_backend():
    found = plan(quickstart(CAPACITY, "moe.experts_per_layer=[2,4,8]", "moe.residual=true"))
    text = describe(found)
    slots = f"at most 1.25 x 2 x {found.micro_batch * found.recipe.data.pack_length} / experts assignments"
    for part in (slots, "2 of 2/4/8 experts", "(2 + 4 + 8) experts x 3", "residual experts", "1/2/4 experts per rank"):
        assert part in text
    assert "every assignment (dropless)" in describe(plan())


def test_expert_parallel_size_divides_every_layer():
    config = moe(expert_parallel={"enabled": True, "autoep_size": 4})
    found = plan(quickstart("moe.experts_per_layer=[4,6,8]"), config, world_size=4)
    assert found.ep_size == 2 and "moe.experts_per_layer = [4, 6, 8]" in found.notes[0]


def test_pyramid_and_residual_are_counted():
    recipe = quickstart(CAPACITY, "moe.experts_per_layer=[2,4,8]", "moe.residual=true")
    assert experts_of_layers(recipe) == (2, 4, 8)
    with torch.device("meta"):
        model = build_backbone(recipe)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = count_parameters(recipe)

    def of(*parts):
        return sum(size for name, size in sizes.items() if any(part in name for part in parts))

    assert counts.total == sum(sizes.values())
    assert counts.experts == of(".experts.") and counts.routers == of(".router.")
    assert counts.residual_experts == of(".mlp.", ".coefficient.") > 0
    width, hidden = recipe.model.width, recipe.moe.ffn_width
    assert counts.experts - counts.active_experts == (2 + 4 + 8 - 3 * 2) * 3 * width * hidden
    plain = estimate_flops(quickstart())
    more = 3 * (3 * width * hidden + 2 * width) - (3 * 8 - 14) * width  # three branches; fewer router rows
    assert estimate_flops(recipe).per_token - plain.per_token == 2 * more


def test_loads_of_a_pyramid():
    even = uniform_load((2, 4), groups=2, device="cpu")
    assert even.tolist() == [[[0.5, 0.5, 0, 0]] * 2, [[0.25] * 4] * 2]
    load = torch.zeros(2, 1, 2, 4)
    load[0, 0, 0, :2] = torch.tensor([3.0, 1.0])
    load[1, 0, 0] = torch.tensor([1.0, 1.0, 0.0, 2.0])
    fractions = load_fractions(load, "modality", even)
    assert fractions[:, 0].tolist() == [[0.75, 0.25, 0, 0], [0.25, 0.25, 0, 0.5]]
    assert torch.equal(fractions[:, 1], even[:, 1])  # no tokens of that modality
