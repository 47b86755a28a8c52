"""Which experts the router chooses, and with what gates, in all of its modes and with a balancing bias."""

import pytest
import torch

from dsmoe_vl.moe.router import Router

WIDTH, TOP_K, TASKS, MODALITIES, TOKENS = 8, 2, 2, 3, 60
MODES = ("token", "plain", "task", "isolated")


def build(mode, experts=7, seed=0):
    """A router with random parameters, and tokens with their tasks and modalities."""
    torch.manual_seed(seed)
    router = Router(WIDTH, experts, TOP_K, TASKS, MODALITIES, mode)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router, (
        torch.randn(TOKENS, WIDTH),
        torch.randint(TASKS, (TOKENS,)),
        torch.randint(MODALITIES, (TOKENS,)),
    )


def owners(experts):
    return torch.tensor([e * MODALITIES // experts for e in range(experts)])


def renormalised(routing):
    """What gates must be, whatever chose the experts."""
    chosen = routing.probabilities.gather(-1, routing.experts)
    return chosen / chosen.sum(-1, keepdim=True)


@pytest.mark.parametrize("mode", MODES)
def test_every_token_against_loops(mode):
    router, (x, tasks, modalities) = build(mode)
    router.selection_bias.normal_(0, 0.1)
    routing = router(x, tasks, modalities)
    for t in range(TOKENS):
        z = {}
        for e in range(7):
            if mode == "isolated" and e * MODALITIES // 7 != modalities[t]:
                continue
            if mode == "task":
                z[e] = router.task_bias[tasks[t], e]
                continue
            z[e] = router.weight[e] @ x[t]
            if mode != "plain":
                z[e] = z[e] + router.task_bias[tasks[t], e] + router.modality_bias[modalities[t], e]
        partition = sum(value.exp() for value in z.values())
        p = {e: value.exp() / partition for e, value in z.items()}
        chosen = sorted(p, key=lambda e: p[e] + router.selection_bias[e], reverse=True)[:TOP_K]
        assert routing.experts[t].tolist() == chosen
        expected = torch.stack([p[e] / sum(p[c] for c in chosen) for e in chosen])
        torch.testing.assert_close(routing.gates[t], expected)
        row = torch.stack([p.get(e, torch.zeros(())) for e in range(7)])
        torch.testing.assert_close(routing.probabilities[t], row)


def test_a_new_router_knows_no_task_and_no_modality():
    router = Router(WIDTH, 7, TOP_K, TASKS, MODALITIES)
    assert not (router.task_bias.any() or router.modality_bias.any() or router.selection_bias.any())
    assert "selection_bias" in router.state_dict()
    assert "selection_bias" not in dict(router.named_parameters())


def test_a_task_decides_alone():
    router, (x, tasks, modalities) = build("task")
    routing = router(x, tasks, modalities)
    choices = [routing.experts[tasks == task].unique(dim=0) for task in range(TASKS)]
    assert [len(choice) for choice in choices] == [1, 1]
    assert not torch.equal(*choices)
    (routing.gates[:, 0].sum() + routing.probabilities.square().sum()).backward()
    # Every parameter takes part in the backward, since every rank has to reduce the same gradients.
    assert router.task_bias.grad.abs().max() > 0
    assert torch.equal(router.weight.grad, torch.zeros_like(router.weight))
    assert torch.equal(router.modality_bias.grad, torch.zeros_like(router.modality_bias))


@pytest.mark.parametrize("experts", [6, 7, 11])
def test_isolated_modalities_keep_to_their_experts(experts):
    router, (x, tasks, modalities) = build("isolated", experts)
    routing = router(x, tasks, modalities)
    owner = owners(experts)
    assert torch.equal(owner[routing.experts], modalities.unsqueeze(-1).expand(-1, TOP_K))
    foreign = owner != modalities.unsqueeze(-1)
    assert torch.equal(routing.probabilities[foreign], torch.zeros(int(foreign.sum())))
    (routing.gates[:, 0].sum() + routing.logits.logsumexp(-1).sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


@pytest.mark.parametrize("mode", ["token", "isolated"])
def test_selection_bias_chooses_and_does_not_weigh(mode):
    router, inputs = build(mode)
    plain = router(*inputs)
    router.selection_bias[0] = 2.0  # more than any probability
    biased = router(*inputs)
    may = torch.ones(TOKENS, dtype=torch.bool) if mode == "token" else inputs[2] == 0
    assert torch.equal((biased.experts == 0).any(-1), may)
    assert ((plain.experts == 0).any(-1) & may).sum() < may.sum()  # the bias did it
    assert torch.equal(biased.probabilities, plain.probabilities)
    for routing in (plain, biased):
        torch.testing.assert_close(routing.gates, renormalised(routing))


@pytest.mark.parametrize("bias", [torch.tensor([0.0] * 2 + [50.0] * 4), torch.tensor([-50.0] * 2 + [0.0] * 4)])
def test_no_bias_lifts_the_expert_of_another_modality(bias):
    router, (x, tasks, modalities) = build("isolated", experts=6)
    router.selection_bias.copy_(bias)
    routing = router(x, tasks, modalities)
    assert torch.equal(owners(6)[routing.experts], modalities.unsqueeze(-1).expand(-1, TOP_K))
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(TOKENS))


def loads_after(router, draw, steps, rate):
    """Loads of 20 more steps together, after the bias was moved that often."""
    total = torch.zeros(1, len(router.selection_bias))
    with torch.no_grad():
        for step in range(steps + 20):
            chosen = router(*draw()).experts.flatten()
            load = torch.bincount(chosen, minlength=total.shape[-1]).float().unsqueeze(0)
            total += load * (step >= steps)
            router.move_selection_bias(load[0], rate)
    return total[0]


def test_the_bias_balances_a_skewed_router():
    router, _ = build("token", experts=8)
    with torch.no_grad():
        router.task_bias.copy_(torch.linspace(2.0, -2.0, 8))

    def draw():
        return torch.randn(256, WIDTH), torch.randint(TASKS, (256,)), torch.randint(MODALITIES, (256,))

    before = loads_after(router, draw, 0, 0.0)
    after = loads_after(router, draw, 300, 0.002)
    print(f"largest over mean load: {before.max() / before.mean():.2f} before, {after.max() / after.mean():.2f} after")
    assert before.max() > 2.5 * before.mean() and before.min() < 0.3 * before.mean()
    assert after.max() < 1.1 * after.mean() and after.min() > 0.9 * after.mean()


def test_the_bias_balances_isolated_modalities_of_unequal_size():
    router, _ = build("isolated", experts=9)
    with torch.no_grad():
        router.task_bias.copy_(torch.tensor([1.0, 0.0, -1.0] * 3))

    def draw():
        modalities = torch.tensor([0] * 200 + [1] * 40 + [2] * 16)
        return torch.randn(256, WIDTH), torch.randint(TASKS, (256,)), modalities

    after = loads_after(router, draw, 300, 0.002).view(MODALITIES, 3)
    assert (after.max(-1).values < 1.1 * after.mean(-1)).all()
