"""The doctor finds the faults that it is there for."""

from __future__ import annotations

import pytest
import torch

from dsmoe_vl.config.checks import check_recipe
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.doctor import silent_faults as doctor
from dsmoe_vl.doctor.silent_faults import silent_faults
from dsmoe_vl.doctor.splits import Probe, shrink
from dsmoe_vl.doctor.task_gradients import TaskGradients
from dsmoe_vl.moe.router import Router
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.parallel.ranks import Ranks


@pytest.fixture
def probe(tiny):
    recipe = load_recipe(tiny.recipe, ["tasks.retrieval.weight=1", "tasks.summary.weight=1"])
    return Probe(shrink(recipe), {}, Ranks(0, 1, 0), None)


def test_a_healthy_recipe_has_no_faults(probe):
    assert silent_faults(probe) == []


def test_a_healthy_recipe_of_the_capacity_backend(tiny):
    settings = ["moe.backend=capacity", "moe.top_k=1", "tasks.retrieval.weight=1", "tasks.summary.weight=1"]
    recipe = shrink(load_recipe(tiny.recipe, settings))
    assert silent_faults(Probe(recipe, {}, Ranks(0, 1, 0), None)) == []


def test_padding_in_the_statistics(probe, monkeypatch):
    right = RouterStats.of

    def wrong(routing, task_ids, modality_ids, real, *sizes):
        return right(routing, task_ids, modality_ids, torch.ones_like(real), *sizes)

    monkeypatch.setattr(RouterStats, "of", staticmethod(wrong))
    (fault,) = silent_faults(probe)
    assert fault.startswith("routing statistics include padding")


def test_a_balancing_term_without_gradient(probe, monkeypatch):
    right = RouterStats.of
    monkeypatch.setattr(
        RouterStats, "of", staticmethod(lambda *given: (s := right(*given))._replace(z_sum=s.z_sum.detach()))
    )
    (fault,) = silent_faults(probe)
    assert fault == "z_loss has no gradient in some router"


def test_an_expert_that_is_dense_to_deepspeed(probe, monkeypatch):
    right = doctor.build_model

    def wrong(*given):
        model = right(*given)
        next(p for name, p in model.named_parameters() if name.endswith("experts.w2")).allreduce = True
        return model

    monkeypatch.setattr(doctor, "build_model", wrong)
    (fault,) = silent_faults(probe)
    assert "experts.w2 is dense to DeepSpeed" in fault


def test_random_evaluation(probe, monkeypatch):
    right = doctor.build_model

    def wrong(*given):
        model = right(*given)
        model.backbone.norm.register_forward_hook(lambda _module, _inputs, out: out + 1e-3 * torch.randn_like(out))
        return model

    monkeypatch.setattr(doctor, "build_model", wrong)
    assert all(fault.startswith("evaluation is random: ") for fault in silent_faults(probe))
    assert silent_faults(probe)


def test_the_shrunk_recipe_of_either_backend_leaves_nothing_to_chance(tiny):
    settings = ["moe.backend=capacity", "moe.capacity_factor=1.0", "moe.top_k=1", "moe.noisy_gate=RSample"]
    recipe = shrink(load_recipe(tiny.recipe, settings))
    assert (recipe.moe.drop_tokens, recipe.moe.noisy_gate, recipe.moe.capacity_factor) == (False, "", 1.25)
    check_recipe(recipe, 2, "tiny.toml")
    assert shrink(load_recipe(tiny.recipe)).moe.drop_tokens


def test_a_router_that_no_task_teaches(probe, monkeypatch):
    right = Router.forward

    def wrong(*given):
        routing = right(*given)
        return routing._replace(gates=routing.gates.detach())

    monkeypatch.setattr(Router, "forward", wrong)
    (fault,) = silent_faults(probe)
    assert fault == "the tasks' loss has no gradient in some router"


def test_gradients_of_tasks_by_hand():
    """Gradients (3, 4), (0, 2) in one step, (6, 8) alone in the other."""
    products = torch.tensor([[[25.0, 8.0], [8.0, 4.0]], [[100.0, 0.0], [0.0, 0.0]]]).double()
    found = TaskGradients.of(("a", "b"), torch.tensor([[1.0, 2.0], [3.0, 0.0]]).double(), products)
    assert found.losses == (2.0, 2.0) and found.norms == (7.5, 2.0)
    assert found.cosines == ((1.0, 0.8), (0.8, 1.0))
    evened = [norm * factor for norm, factor in zip(found.norms, found.factors(), strict=True)]
    assert evened == pytest.approx([15**0.5] * 2)


def test_a_task_without_a_gradient_keeps_its_weight():
    found = TaskGradients.of(("a", "b"), torch.zeros(1, 2).double(), torch.zeros(1, 2, 2).double())
    assert found.factors() == (1.0, 1.0) and found.cosines == ((0.0, 0.0), (0.0, 0.0))
