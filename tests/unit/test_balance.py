"""The balancing terms by hand, against plain loops, and the balance loss against that of transformers' Mixtral."""

import math

import pytest
import torch

from dsmoe_vl.moe.balance import (
    entropy,
    global_entropy_loss,
    load_balance_loss,
    local_entropy_loss,
    mutual_information,
    router_z_loss,
    updated_selection_bias,
)
from dsmoe_vl.moe.router import Routing
from dsmoe_vl.moe.stats import RouterStats, grouped
from dsmoe_vl.objective.objective import load_fractions

LAYERS, TASKS, MODALITIES, EXPERTS, TOKENS, TOP_K = 2, 2, 3, 5, 40, 2


def random_stats(seed=0):
    """Logits [N, T, E] that can be differentiated, what tokens they are of, and the statistics of all layers."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator).requires_grad_()
    tasks = torch.randint(TASKS, (TOKENS,), generator=generator)
    modalities = torch.randint(MODALITIES, (TOKENS,), generator=generator)
    real = torch.rand(TOKENS, generator=generator) > 0.3
    layers = []
    for z in logits:
        p = z.softmax(-1)
        chosen = p.topk(TOP_K).indices
        routing = Routing(chosen, p.gather(-1, chosen), p, z)
        layers.append(RouterStats.of(routing, tasks, modalities, real, TASKS, MODALITIES))
    return logits, tasks, modalities, real, RouterStats.stack(layers)


def plain_entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def test_grouped():
    sums = torch.randn(LAYERS, TASKS, MODALITIES, EXPERTS, generator=torch.Generator().manual_seed(0))
    shapes = {"all": 1, "task": TASKS, "modality": MODALITIES}
    expected = {over: torch.zeros(LAYERS, groups, EXPERTS) for over, groups in shapes.items()}
    for layer in range(LAYERS):
        for task in range(TASKS):
            for modality in range(MODALITIES):
                expected["all"][layer, 0] += sums[layer, task, modality]
                expected["task"][layer, task] += sums[layer, task, modality]
                expected["modality"][layer, modality] += sums[layer, task, modality]
    for over, oracle in expected.items():
        torch.testing.assert_close(grouped(sums, over), oracle)


def test_balance_loss_of_groups_by_hand():
    # One layer, two experts; one token of group 0, three of group 1.
    probability_sum = torch.tensor([[[0.6, 0.4], [0.5, 2.5]]])
    fraction = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    of_groups = (2 * 0.6, 2 * (0.25 * 0.5 + 0.75 * 2.5) / 3)
    loss = load_balance_loss(probability_sum, fraction, 4)
    torch.testing.assert_close(loss, torch.tensor((1 * of_groups[0] + 3 * of_groups[1]) / 4))


def test_layers_of_fewer_experts_by_hand():
    """The second layer has two experts, of four columns: even routing gives one a layer."""
    probability_sum = torch.tensor([[[2.0, 2.0, 2.0, 2.0]], [[4.0, 4.0, 0.0, 0.0]]])
    fraction = torch.tensor([[[0.25, 0.25, 0.25, 0.25]], [[0.5, 0.5, 0.0, 0.0]]])
    loss = load_balance_loss(probability_sum, fraction, 8, torch.tensor([4, 2]).view(2, 1, 1))
    torch.testing.assert_close(loss, torch.tensor(2.0))


@pytest.mark.parametrize("over", ["all", "task", "modality"])
def test_balance_loss_against_loops(over):
    logits, tasks, modalities, real, stats = random_stats()
    fractions = load_fractions(stats.load, over)
    loss = load_balance_loss(grouped(stats.probability_sum, over), fractions, int(real.sum()))
    group_of = {"all": torch.zeros_like(tasks), "task": tasks, "modality": modalities}[over]
    expected = 0.0
    for layer in range(LAYERS):
        for group in group_of[real].unique():
            members = real & (group_of == group)
            p = torch.zeros(EXPERTS)
            f = torch.zeros(EXPERTS)
            for t in members.nonzero().flatten():
                token = logits[layer, t].softmax(-1)
                p += token / members.sum()
                for e in token.argsort(descending=True)[:TOP_K]:
                    f[e] += 1 / (TOP_K * members.sum())
            expected += members.sum() / real.sum() * EXPERTS * (f * p).sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_equals_mixtral(top_k):
    """Mixtral's f_e are assignments a token and sum to K, ours are shares and sum to 1: theirs is K times ours.

    It takes f_e from the same batch, and of several layers it pools tokens before the product: one layer of N * T
    tokens, where we add the layers up.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # takes seconds

    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator).requires_grad_()
    real = torch.rand(TOKENS, generator=generator) > 0.3
    none = torch.zeros(TOKENS, dtype=torch.int64)
    layers = []
    for z in logits:
        p = z.softmax(-1)
        gates, chosen = p.topk(top_k)
        layers.append(RouterStats.of(Routing(chosen, gates, p, z), none, none, real, 1, 1))
    stats = RouterStats.stack(layers)
    mask, tokens = real.unsqueeze(0), int(real.sum())

    sums, load = stats.probability_sum, stats.load
    ours = load_balance_loss(grouped(sums, "all"), load_fractions(load, "all"), tokens)
    theirs = sum(load_balancing_loss_func((z,), EXPERTS, top_k, mask) for z in logits)
    pooled, pooled_load = sums.sum(0, keepdim=True), load.sum(0, keepdim=True)
    ours_pooled = load_balance_loss(grouped(pooled, "all"), load_fractions(pooled_load, "all"), LAYERS * tokens)
    theirs_pooled = load_balancing_loss_func(tuple(logits), EXPERTS, top_k, mask)
    for a, b in ((ours, theirs), (ours_pooled, theirs_pooled)):
        torch.testing.assert_close(top_k * a, b)
        (of_ours,) = torch.autograd.grad(top_k * a, logits, retain_graph=True)
        (of_theirs,) = torch.autograd.grad(b, logits, retain_graph=True)
        torch.testing.assert_close(of_ours, of_theirs)


def test_z_loss_against_loops():
    logits, _, _, real, stats = random_stats()
    expected = 0.0
    for layer in range(LAYERS):
        for t in real.nonzero().flatten():
            expected += math.log(sum(math.exp(z) for z in logits[layer, t].tolist())) ** 2 / int(real.sum())
    torch.testing.assert_close(router_z_loss(stats.z_sum, int(real.sum())).item(), expected, rtol=1e-5, atol=0)


def test_local_entropy_by_hand():
    # Two layers, three modalities, of which the last has no tokens.
    loss = local_entropy_loss(torch.tensor([[4.0, 3.0, 0.0], [2.0, 6.0, 0.0]]), torch.tensor([2.0, 3.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor(4 / 2 + 3 / 3 + 2 / 2 + 6 / 3))


def test_local_entropy_against_loops():
    logits, _, modalities, real, stats = random_stats()
    tokens = torch.stack([(real & (modalities == m)).sum() for m in range(MODALITIES)])
    expected = 0.0
    for layer in range(LAYERS):
        for t in real.nonzero().flatten():
            expected += plain_entropy(logits[layer, t].softmax(-1).tolist()) / int(tokens[modalities[t]])
    found = local_entropy_loss(stats.entropy_sum, tokens).item()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_global_entropy_by_hand():
    """Four experts; the threshold asks for two."""
    tokens = torch.tensor([2.0, 4.0, 0.0, 8.0])
    sums = torch.tensor([[
        [2.0, 0.0, 0.0, 0.0],  # one expert: short by log 2
        [1.0, 1.0, 1.0, 1.0],  # four: no loss
        [0.0, 0.0, 0.0, 0.0],  # no tokens: no loss
        [6.0, 2.0, 0.0, 0.0],  # H = log 4 - 3/4 log 3
    ]])  # fmt: skip
    short = math.log(2) - (math.log(4) - 0.75 * math.log(3))
    loss = global_entropy_loss(sums, tokens, math.log(2))
    torch.testing.assert_close(loss, torch.tensor(math.log(2) + short))
    twice = global_entropy_loss(sums.repeat(2, 1, 1), tokens, math.log(2))
    torch.testing.assert_close(twice, 2 * loss)  # layers add up


def test_mutual_information_by_hand():
    one_expert_each = torch.eye(4)[:3] * 5  # three tasks of 5 tokens, four experts
    alike = torch.tensor([[1.0, 3.0, 2.0, 0.0], [2.0, 6.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(
        mutual_information(torch.stack((one_expert_each, alike, torch.zeros(3, 4)))),
        torch.tensor([math.log(3), 0.0, 0.0]),
        rtol=1e-5,
        atol=1e-6,
    )


def test_mutual_information_against_loops():
    _, _, _, _, stats = random_stats()
    sums = grouped(stats.probability_sum, "task").detach()
    for found, layer in zip(mutual_information(sums).tolist(), sums.tolist(), strict=True):
        whole = sum(map(sum, layer))
        expected = 0.0
        for row in layer:
            for e, value in enumerate(row):
                of_task, of_expert = sum(row) / whole, sum(r[e] for r in layer) / whole
                expected += value / whole * math.log(value / whole / (of_task * of_expert))
        assert found == pytest.approx(expected, abs=1e-5)


def test_entropy():
    rows = [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.7, 0.2, 0.1, 0.0]]
    torch.testing.assert_close(entropy(torch.tensor(rows)), torch.tensor([plain_entropy(row) for row in rows]))


@pytest.mark.parametrize("term", [entropy, mutual_information, lambda p: global_entropy_loss(p, p.sum((0, 2)), 2.0)])
def test_gradients_are_exact_and_finite_at_zero(term):
    generator = torch.Generator().manual_seed(0)
    sums = 1 + torch.rand(LAYERS, MODALITIES, EXPERTS, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(term, sums.requires_grad_())
    zeros = torch.zeros(LAYERS, MODALITIES, EXPERTS)
    zeros[:, :, 0] = 4.0  # all other experts have probability 0, as those of other modalities do
    for values in (zeros, torch.zeros_like(zeros)):
        (gradient,) = torch.autograd.grad(term(values.requires_grad_()).sum(), values)
        assert gradient.isfinite().all()


def test_experts_that_are_shut_out_get_no_gradient():
    """Logits of minus infinity, as an isolated modality has, take no part in any term."""
    logits = torch.tensor([[1.0, 0.5, -math.inf, -math.inf], [0.2, 0.9, -math.inf, -math.inf]], requires_grad=True)
    p = logits.softmax(-1)
    sums = p.sum(0).view(1, 1, -1).expand(1, 2, -1)
    loss = entropy(p).sum() + mutual_information(sums).sum() + global_entropy_loss(sums, torch.tensor([2, 2]), 2.0)
    (gradient,) = torch.autograd.grad(loss + logits.logsumexp(-1).square().sum(), logits)
    assert gradient.isfinite().all()
    assert torch.equal(gradient[:, 2:], torch.zeros(2, 2)) and gradient[:, :2].abs().min() > 0


def test_selection_bias_by_hand():
    # Mean loads 4 and 2.
    load = torch.tensor([[1.0, 4.0, 7.0], [2.0, 2.0, 2.0]])
    bias = torch.tensor([[0.0, 0.5, 0.25], [1.0, -1.0, 0.0]])
    expected = torch.tensor([[0.125, 0.5, 0.125], [1.0, -1.0, 0.0]])
    assert torch.equal(updated_selection_bias(bias, load, 0.125), expected)
