"""The sparse feed-forward against an oracle that visits every token and every choice in plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsmoe_vl.model.layers import SwiGLU
from dsmoe_vl.moe.balance import load_balance_loss, router_z_loss
from dsmoe_vl.moe.experts import Experts
from dsmoe_vl.moe.feed_forward import MoEFeedForward
from dsmoe_vl.moe.router import Router

WIDTH, HIDDEN, EXPERTS, TOKENS, TASKS, MODALITIES = 12, 20, 5, 33, 3, 3


def build(top_k, shared=False, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    layer = MoEFeedForward(
        Router(WIDTH, EXPERTS, top_k, TASKS, MODALITIES),
        Experts(EXPERTS, WIDTH, HIDDEN),
        SwiGLU(WIDTH, 8) if shared else None,
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = (
        torch.randn(TOKENS, WIDTH),
        torch.randint(0, TASKS, (TOKENS,)),
        torch.randint(0, MODALITIES, (TOKENS,)),
        torch.rand(TOKENS) > 0.2,
    )
    return layer.to(device, dtype), inputs


def oracle(layer, x, tasks, modalities):
    """One token at a time, one choice at a time."""
    router, experts = layer.router, layer.experts
    rows, probabilities, chosen, log_partitions = [], [], [], []
    for t in range(len(x)):
        z = router.weight @ x[t] + router.task_bias[tasks[t]] + router.modality_bias[modalities[t]]
        p = z.softmax(0)
        best = p.argsort(descending=True)[: router.top_k]
        out = torch.zeros(WIDTH)
        for e in best:
            hidden = F.silu(experts.w1[e] @ x[t]) * (experts.w3[e] @ x[t])
            gate = p[e] / p[best].sum() if router.top_k > 1 else p[e]
            out = out + gate * (experts.w2[e] @ hidden)
        if layer.shared is not None:
            out = out + layer.shared(x[t])
        rows.append(out)
        probabilities.append(p)
        chosen.append(best.tolist())
        log_partitions.append(z.logsumexp(0))
    return torch.stack(rows), torch.stack(probabilities), chosen, torch.stack(log_partitions)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_output_statistics_and_every_gradient(top_k, shared):
    layer, (x, tasks, modalities, real) = build(top_k, shared)
    x.requires_grad_()
    out, stats = layer(x, tasks, modalities, real)
    expected, probabilities, chosen, log_partitions = oracle(layer, x, tasks, modalities)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    load = torch.zeros(TASKS, MODALITIES, EXPERTS)
    for t in range(TOKENS):
        for e in chosen[t]:
            load[tasks[t], modalities[t], e] += float(real[t])
    assert torch.equal(stats.load, load)
    every = stats.probability_sum.sum((0, 1))
    torch.testing.assert_close(every, probabilities[real].sum(0))
    for task in range(TASKS):
        for modality in range(MODALITIES):
            cell = real & (tasks == task) & (modalities == modality)
            torch.testing.assert_close(stats.probability_sum[task, modality], probabilities[cell].sum(0))
    for modality in range(MODALITIES):
        p = probabilities[real & (modalities == modality)]
        torch.testing.assert_close(stats.entropy_sum[modality], -(p * p.log()).sum())
    torch.testing.assert_close(stats.z_sum, log_partitions[real].square().sum())

    # Every gradient, of an output that mixes all of it.
    weight = torch.randn_like(out)
    fraction = torch.rand(EXPERTS).softmax(0)
    ours = (out * weight).sum() + (every * fraction).sum() + 0.1 * stats.z_sum
    theirs = (expected * weight).sum() + (probabilities[real].sum(0) * fraction).sum()
    theirs = theirs + 0.1 * log_partitions[real].square().sum()
    names, parameters = zip(*[("x", x), *layer.named_parameters()], strict=True)
    pairs = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_is_in_no_statistic():
    layer, (x, tasks, modalities, _) = build(2)
    nothing = torch.zeros(TOKENS, dtype=torch.bool)
    _, stats = layer(x, tasks, modalities, nothing)
    assert stats.load.sum() == 0 and stats.probability_sum.abs().sum() == 0 and stats.z_sum == 0


def test_an_expert_without_tokens_has_zero_gradient():
    layer, (x, tasks, modalities, real) = build(1)
    with torch.no_grad():
        layer.router.task_bias[:, 0] = -100.0
    out, stats = layer(x, tasks, modalities, real)
    out.sum().backward()
    assert stats.load[..., 0].sum() == 0
    assert torch.equal(layer.experts.w1.grad[0], torch.zeros(HIDDEN, WIDTH))


def test_balance_loss_by_hand():
    # Two experts, three tokens with p = (.5 .5), (.8 .2), (.9 .1), last step's load 3 : 1.
    probability_sum = torch.tensor([[2.2, 0.8]])
    loss = load_balance_loss(probability_sum, torch.tensor([[0.75, 0.25]]), 3)
    torch.testing.assert_close(loss, torch.tensor(2 * (0.75 * 2.2 + 0.25 * 0.8) / 3))
    # Even load gives exactly one a layer, whatever the probabilities.
    even = load_balance_loss(probability_sum, torch.tensor([[0.5, 0.5]]), 3)
    torch.testing.assert_close(even, torch.tensor(1.0))


def test_z_loss_by_hand():
    torch.testing.assert_close(router_z_loss(torch.tensor([4.0, 9.0]), 2), torch.tensor(6.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the grouped CUDA kernel was not checked")
def test_cuda_grouped_products_match_cpu():
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 17, 8, 34])
    experts = Experts(len(counts), 64, 128)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(int(counts.sum()), 64)
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        moved = Experts(len(counts), 64, 128).to(device, dtype)
        moved.load_state_dict(experts.state_dict())
        rows = x.to(device, dtype).requires_grad_()
        out = moved.of_rows(rows, counts.to(device))
        grads = torch.autograd.grad(out.float().square().sum(), (rows, *moved.parameters()))
        results.append([value.float().cpu() for value in (out, *grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2 * float(a.abs().max()))
