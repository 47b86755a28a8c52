"""The experts as one function against the same experts operator by operator, on a CPU."""

from __future__ import annotations

import pytest
import torch

from dsmoe_vl.moe import expert_bank
from dsmoe_vl.moe.experts import Experts
from dsmoe_vl.moe.grouped_bank import grouped_bank
from dsmoe_vl.moe.rows import Assignments

EXPERTS, WIDTH, HIDDEN = 7, 12, 20


class ByOperator(Experts):
    as_one_function = False


def both(dtype=torch.float32):
    torch.manual_seed(0)
    made = [kind(EXPERTS, WIDTH, HIDDEN) for kind in (ByOperator, Experts)]
    for parameter in made[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made[1].load_state_dict(made[0].state_dict())
    return [module.to(dtype) for module in made]


def choices(tokens, top_k):
    """Without expert 2 and the last one."""
    scores = torch.rand(tokens, EXPERTS)
    scores[:, [2, EXPERTS - 1]] = -1
    return scores.topk(top_k, dim=-1).indices


@pytest.mark.parametrize("piece", [1, 16, 1024])
@pytest.mark.parametrize(("tokens", "top_k"), [(33, 3), (33, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("trains", ["everything", "weights", "rows and gates", "rows"])
def test_values_and_gradients(monkeypatch, piece, tokens, top_k, trains):
    monkeypatch.setattr(expert_bank, "_PIECE", piece)
    modules = both()
    assignments = Assignments.of(choices(tokens, top_k), EXPERTS)
    x, gates, direction = torch.randn(tokens, WIDTH), torch.rand(tokens * top_k), torch.randn(tokens, WIDTH)
    gates[: tokens // 2 * top_k : top_k] = 0  # as of a dropped assignment
    x.requires_grad_(trains != "weights"), gates.requires_grad_("gates" in trains or trains == "everything")
    found = []
    for module in modules:
        module.requires_grad_(trains in ("everything", "weights"))
        out = module(x, gates, assignments)
        inputs = [value for value in (x, gates, *module.parameters()) if value.requires_grad]
        found.append([out, *torch.autograd.grad((out * direction).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_bfloat16():
    whole, ours = both(), both(torch.bfloat16)[1]
    assignments = Assignments.of(choices(60, 3), EXPERTS)
    x, gates = torch.randn(60, WIDTH), torch.rand(180)
    found = []
    for module in (whole[0], ours):
        dtype = module.w1.dtype
        inputs = [x.to(dtype).requires_grad_(), gates.to(dtype).requires_grad_()]
        out = module(*inputs, assignments)
        found.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *module.parameters()])])
    for one, other in zip(*found, strict=True):
        assert other.dtype == torch.bfloat16
        torch.testing.assert_close(other.float(), one, rtol=0.05, atol=0.03 * float(one.detach().abs().max()))


@pytest.mark.parametrize("bank", [expert_bank.expert_bank, grouped_bank])
@pytest.mark.parametrize("trains", ["everything", "rows", "weights"])
def test_the_gradients_of_rows_can_be_had_early(bank, trains):
    """The same as without; for weights alone there are none to send."""
    module, assignments = both()[1], Assignments.of(choices(33, 3), EXPERTS)
    x, gates, direction = torch.randn(33, WIDTH), torch.rand(99), torch.randn(33, WIDTH)
    module.requires_grad_(trains != "rows"), x.requires_grad_(trains != "weights")
    gates.requires_grad_(trains != "weights")
    inputs, found = [value for value in (x, gates, *module.parameters()) if value.requires_grad], []
    seen: list[torch.Tensor] = []
    for early in (None, lambda *gradients: seen.extend(gradients)):
        out = bank(x, gates, (module.w1, module.w2, module.w3), assignments, early)
        found.append(torch.autograd.grad((out * direction).sum(), inputs))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert len(seen) == (0 if trains == "weights" else 2)
    assert all(torch.equal(one, other) for one, other in zip(seen, found[1][: len(seen)], strict=True))


def test_pieces_are_all_rows_once():
    counts = [5, 0, 1500, 600, 400, 24, 1, 0]
    pieces = expert_bank.pieces_of(counts)
    assert [(experts.start, experts.stop) for experts, _ in pieces] == [(0, 2), (2, 3), (3, 6), (6, 8)]
    for experts, rows in pieces:
        assert rows.stop - rows.start == sum(counts[experts]) and rows.start == sum(counts[: experts.start])


def test_weights_that_were_emptied_between_forward_and_backward():
    """As ZeRO-3 does: what is kept is the parameter, whatever its data is by then."""
    module, found = both()[1], []
    assignments = Assignments.of(choices(20, 2), EXPERTS)
    x = torch.randn(20, WIDTH)
    for empties in (False, True):
        out = module(x, torch.ones(40), assignments)
        full = [parameter.data for parameter in module.parameters()]
        for parameter, data in zip(module.parameters(), full, strict=True):
            parameter.data = data.new_empty(0) if empties else data
        for parameter, data in zip(module.parameters(), full, strict=True):
            parameter.data = data.clone()
        found.append(torch.autograd.grad(out.sum(), [*module.parameters()]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
