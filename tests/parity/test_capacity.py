"""The capacity backend: the one-process form against DeepSpeed's layer, against the dropless form, and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsmoe_vl.config.model import MoEConfig
from dsmoe_vl.model.init import initialise
from dsmoe_vl.model.layers import SwiGLU
from dsmoe_vl.moe.capacity_feed_forward import CapacityFeedForward, expert_slots, within_capacity
from dsmoe_vl.moe.expert_parallel_capacity import CapacityMoE, TokenCounts
from dsmoe_vl.moe.experts import Experts
from dsmoe_vl.moe.feed_forward import MoEFeedForward
from dsmoe_vl.moe.router import Router
from dsmoe_vl.tasks.registry import build_backbone
from tests.distributed.train_losses import RECIPE

WIDTH, EXPERTS, TOKENS, TASKS, MODALITIES = 12, 6, 40, 3, 3
FORMS = [
    {"top_k": 1}, {"top_k": 2}, {"top_k": 3}, {"residual": True}, {"drop_tokens": False}, {"min_capacity": 9},
    {"routing": "isolated"}, {"capacity_factor": 100.0, "eval_capacity_factor": 100.0},
]  # fmt: skip


def build(**settings):
    """The one-process form with random weights, its inputs (a fifth of them padding), and its settings."""
    torch.manual_seed(0)
    scarce = {"capacity_factor": 0.6, "eval_capacity_factor": 0.9, "min_capacity": 1}
    moe = MoEConfig("capacity", EXPERTS, ffn_width=20)
    moe = replace(moe, **{**(scarce if settings.get("drop_tokens", True) else {}), **settings})
    router = Router(WIDTH, EXPERTS, moe.top_k, TASKS, MODALITIES, moe.routing)
    layer = CapacityFeedForward(moe, WIDTH, router, Experts(EXPERTS, WIDTH, 20), SwiGLU(WIDTH, 8))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    router.selection_bias.normal_(std=0.05)
    inputs = (
        torch.randn(TOKENS, WIDTH),
        torch.randint(0, TASKS, (TOKENS,)),
        torch.randint(0, MODALITIES, (TOKENS,)),
        torch.rand(TOKENS) > 0.2,
    )
    return layer, inputs


def gradients(layer, x, result):
    """Of every parameter and of x, of an output that mixes all that a layer returns; experts stacked."""
    out, stats = result
    torch.manual_seed(1)
    mixed = (out * torch.randn_like(out)).sum() + stats.z_sum + (stats.probability_sum.cumsum(-1) ** 2).sum()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = dict(zip(("x", *names), torch.autograd.grad(mixed, (x, *parameters)), strict=True))
    separate = [name for name in found if "deepspeed_experts" in name]
    for name in separate:
        found.setdefault(f"experts.{name.rpartition('.')[2]}", []).append(found.pop(name))
    stacked = {name: torch.stack(value) if isinstance(value, list) else value for name, value in found.items()}
    return {name.replace("deepspeed_moe.gate.", ""): value for name, value in stacked.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_one_process_and_deepspeed_are_the_same(settings, training):
    ours, (x, *rest) = build(**settings)
    theirs = CapacityMoE(ours, ep_size=1, ep_rank=0)
    ours.train(training), theirs.train(training)
    x.requires_grad_()
    one, other = ours(x, *rest), theirs(x, *rest)
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    for name, a, b in zip(one[1]._fields, one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    wanted = float(rest[-1].sum()) * ours.moe.top_k
    assert one[1].load.sum() + one[1].dropped == wanted
    drops = ours.moe.drop_tokens and ours.moe.capacity_factor < 1
    assert (one[1].dropped > 0) == drops, one[1].dropped
    a, b = gradients(ours, x, one), gradients(theirs, x, other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_without_drops_it_is_the_dropless_form(top_k):
    layer, (x, tasks, modalities, real) = build(top_k=top_k, capacity_factor=100.0)
    dropless = MoEFeedForward(layer.router, layer.experts, layer.shared)
    out, stats = layer(x, tasks, modalities, real)
    expected, expected_stats = dropless(x, tasks, modalities, real)
    torch.testing.assert_close(out[real], expected[real])
    torch.testing.assert_close(out[~real], layer.shared(x)[~real])  # padding is not computed
    for value, wanted in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(value, wanted)


def test_slots_by_hand():
    moe = MoEConfig("capacity", top_k=2, capacity_factor=1.25, eval_capacity_factor=2.0, min_capacity=4)
    assert expert_slots(moe, 96, 8, training=True) == 30
    assert expert_slots(moe, 100, 8, training=True) == 32  # 31.25
    assert expert_slots(moe, 96, 8, training=False) == 48
    assert expert_slots(moe, 10, 64, training=True) == 4
    assert expert_slots(moe, 3, 8, training=False) == 3  # a token goes to an expert once


def test_dropped_by_hand():
    """Five tokens of which the fourth is padding, two slots; expert 0 is everyone's first choice but the last's."""
    experts = torch.tensor([[1, 0], [0, 1], [0, 2], [0, 1], [1, 0]])
    gates = torch.tensor([[0.4, 0.6], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1], [0.55, 0.45]])
    real = torch.tensor([True, True, True, False, True])
    # First choices: 0, 0, (0: full), -, 1. Second: 1, (1: full), 2, -, (0: full).
    kept = within_capacity(experts, gates, real, expert_count=3, slots=2)
    expected = [[True, True], [True, False], [False, True], [False, False], [True, False]]
    assert kept.tolist() == expected
    # One choice: the first come.
    kept = within_capacity(experts[:, :1], torch.ones(5, 1), real, expert_count=3, slots=1)
    assert kept.flatten().tolist() == [True, True, False, False, False]
    # Three choices: the largest gates.
    experts = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 2, 1]])
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.4, 0.35, 0.25]])
    kept = within_capacity(experts, gates, torch.ones(3, dtype=torch.bool), expert_count=3, slots=1)
    assert kept.tolist() == [[False, True, False], [True, False, False], [False, True, False]]


def test_gates_of_what_is_kept_sum_to_one():
    """With equal experts a token comes out the same however many of its choices are kept, unless none is."""
    layer, (x, *rest) = build(capacity_factor=0.3)
    layer.shared = None
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    expected = layer.experts.of_rows(x, torch.tensor([TOKENS, *[0] * (EXPERTS - 1)]))
    out, stats = layer(x, *rest)
    computed = out.abs().sum(-1) > 0
    assert stats.dropped > 0 and stats.load.sum() / 2 < computed.sum() <= stats.load.sum()
    torch.testing.assert_close(out[computed], expected[computed])


@pytest.mark.parametrize("noise", [
    {"top_k": 1, "noisy_gate": "RSample"}, {"noisy_gate": "Jitter"}, {"top_k": 1, "random_token_selection": True},
], ids=str)  # fmt: skip
def test_noise_is_in_training_only(noise):
    source, (x, *rest) = build(**noise)
    with torch.no_grad():
        source.router.weight.mul_(1e-3)  # near ties, which even a jitter of one percent decides
        source.router.task_bias.zero_(), source.router.modality_bias.zero_(), source.router.selection_bias.zero_()
    layer = CapacityMoE(source, ep_size=1, ep_rank=0)
    noisy = [layer(x, *rest)[0] for _ in range(4)]
    assert any(not torch.equal(out, noisy[0]) for out in noisy[1:])
    layer.eval()
    quiet = [layer(x, *rest) for _ in range(3)]
    for out, stats in quiet[1:]:
        assert torch.equal(out, quiet[0][0]) and torch.equal(stats.load, quiet[0][1].load)
    torch.testing.assert_close(quiet[0][0], source.eval()(x, *rest)[0])


def test_random_selection_drops_as_many():
    settings = {"top_k": 1, "capacity_factor": 0.5}
    first, (x, *rest) = build(**settings)
    random, _ = build(random_token_selection=True, **settings)
    expected = first(x, *rest)[1]
    layer = CapacityMoE(random, ep_size=1, ep_rank=0)
    for _ in range(3):
        stats = layer(x, *rest)[1]
        assert torch.equal(stats.load.sum((0, 1)), expected.load.sum((0, 1)))
        assert stats.dropped == expected.dropped > 0


def test_other_numbers_of_tokens_are_refused():
    source, inputs = build()
    known = frozenset({TOKENS})
    layer = CapacityMoE(source, ep_size=1, ep_rank=0, tokens=TokenCounts(known, known))
    with pytest.raises(AssertionError, match=rf"39 tokens, not \[{TOKENS}\]"):
        layer(*(value[:-1] for value in inputs))


def test_first_values_are_those_of_the_dropless_backend():
    states = []
    for backend in ("dropless", "capacity"):
        model = build_backbone(replace(RECIPE, moe=replace(RECIPE.moe, backend=backend)))
        initialise(model, seed=3)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
