"""Learned weights of tasks, beside the papers' rules written down anew."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dsmoe_vl.config.checks import check_recipe
from dsmoe_vl.config.recipe import ObjectiveConfig, Recipe, StageConfig, TasksConfig, TaskWeightsConfig
from dsmoe_vl.config.task_table import CaptionConfig, RetrievalConfig, SummaryConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.objective.task_weights import TaskWeights
from tests.distributed.train_losses import RECIPE

RATE, DECAY = 0.05, 0.01
TERMS = ("caption", "retrieval", "summary", "importance", "ranking")
COUNTS = dict.fromkeys(TERMS, 7)


def recipe(method: str) -> Recipe:
    summary = SummaryConfig(weight=0.5, importance_weight=2.0, ranking_weight=0.0)
    tasks = TasksConfig(caption=CaptionConfig(weight=1.0), retrieval=RetrievalConfig(weight=3.0), summary=summary)
    settings = TaskWeightsConfig(method, RATE, DECAY)
    return Recipe(tasks=tasks, objective=ObjectiveConfig(task_weights=settings), data=RECIPE.data)


def steps(count: int) -> list[dict[str, torch.Tensor]]:
    """Losses of all terms that fall at different speeds."""
    noise = torch.Generator().manual_seed(0)
    rates = {name: 0.9 + 0.02 * index for index, name in enumerate(TERMS)}
    return [
        {f"loss_{name}": 5 * rates[name] ** step + 0.1 * torch.rand((), generator=noise) for name in TERMS}
        for step in range(count)
    ]


def of_tasks(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the recipe weighs the terms."""
    summary = 0.5 * terms["loss_summary"] + 2 * terms["loss_importance"]
    return torch.stack([terms["loss_caption"], 3 * terms["loss_retrieval"], summary]).double()


def trained(method: str, count: int = 30) -> TaskWeights:
    weights = TaskWeights(recipe(method))
    for terms in steps(count):
        weights.update(terms, COUNTS)
    return weights


def test_fixed_weights_are_those_of_the_recipe():
    weights = trained("fixed")
    assert [weights.of(term) for term in TERMS] == [1.0, 3.0, 0.5, 2.0, 0.0]
    assert weights.logged() == {}


@pytest.mark.parametrize("method", ["uncertainty", "famo"])
def test_they_begin_with_those_of_the_recipe(method):
    weights = TaskWeights(recipe(method))
    assert [float(weights.of(term)) for term in TERMS] == [1.0, 3.0, 0.5, 2.0, 0.0]


def test_uncertainty_is_joint_descent():
    """Log variances as parameters beside the losses, by autograd."""
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=RATE, weight_decay=DECAY)
    for terms in steps(30):
        adam.zero_grad()
        ((-s).exp() * of_tasks(terms) + s / 2).sum().backward()
        adam.step()
    torch.testing.assert_close(trained("uncertainty").factors, (-s).exp().detach())


def test_uncertainty_comes_to_rest_where_weighted_losses_are_a_half():
    weights = TaskWeights(replace(recipe("uncertainty"), objective=ObjectiveConfig(
        task_weights=TaskWeightsConfig("uncertainty", 0.05, 0.0))))  # fmt: skip
    terms = {f"loss_{name}": torch.tensor(value) for name, value in zip(TERMS, (4.0, 0.1, 1.0, 0.5, 9.0), strict=True)}
    for _ in range(2000):
        weights.update(terms, COUNTS)
    weighted = weights.factors * of_tasks(terms)
    torch.testing.assert_close(weighted, torch.full((3,), 0.5, dtype=torch.float64), rtol=1e-4, atol=0)


def test_famo_follows_its_algorithm():
    """Liu et al. 2023, algorithm 1: the gradient of the logits by autograd, the update of the model by its scale c."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=RATE, weight_decay=DECAY)
    losses = [of_tasks(terms) for terms in steps(30)]
    for before, now in pairwise(losses):
        adam.zero_grad()
        logits.softmax(0).backward(before.log() - now.log())
        adam.step()
    z = logits.detach().softmax(0)
    c = 1 / (z / losses[-1]).sum()
    torch.testing.assert_close(trained("famo").factors, 3 * c * z / losses[-1], rtol=1e-6, atol=1e-9)


def test_famo_favours_what_does_not_improve():
    weights = TaskWeights(recipe("famo"))
    for step in range(200):
        terms = {f"loss_{name}": torch.tensor(1.0) for name in TERMS}
        terms["loss_caption"] = torch.tensor(0.98**step)
        weights.update(terms, COUNTS)
    shares = weights.factors * of_tasks(terms)  # of the logarithms
    assert float(shares[0]) < 0.7 * float(shares[1])


@pytest.mark.parametrize("method", ["uncertainty", "famo"])
def test_a_task_without_targets_keeps_its_latest_loss(method):
    weights = TaskWeights(recipe(method))
    for terms in steps(5):
        weights.update(terms, COUNTS)
    before = weights.state_dict()
    none = {**COUNTS, "retrieval": 0}
    weights.update({f"loss_{name}": torch.tensor(0.0 if name == "retrieval" else 1.0) for name in TERMS}, none)
    after = weights.state_dict()
    assert after["losses"][1] == before["losses"][1] and after["losses"][0] != before["losses"][0]
    assert bool(weights.factors.isfinite().all())


@pytest.mark.parametrize("method", ["uncertainty", "famo"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_losses_leave_finite_weights(method, value):
    weights = TaskWeights(recipe(method))
    for number in range(20):
        terms = {f"loss_{name}": torch.tensor(1.0) for name in TERMS}
        terms["loss_retrieval"] = torch.tensor(value if number % 2 else 1.0)
        weights.update(terms, COUNTS)
    assert bool(weights.factors.isfinite().all())


@pytest.mark.parametrize("method", ["fixed", "uncertainty", "famo"])
def test_a_checkpoint_carries_them(method):
    whole, first, second = trained(method), trained(method, 10), TaskWeights(recipe(method))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for terms in steps(30)[10:]:
        second.update(terms, COUNTS)
    assert second.factors.equal(whole.factors) and second.state_dict() == whole.state_dict()


def test_another_method_begins_anew():
    other = TaskWeights(recipe("famo"))
    other.load_state_dict(trained("uncertainty").state_dict())
    assert other.state_dict() == TaskWeights(recipe("famo")).state_dict()


def test_what_a_stage_does_not_learn_has_no_weight():
    stage = StageConfig(steps=1, tasks={"retrieval": 0.0})
    weights = TaskWeights(replace(recipe("famo"), stages=(stage,)))
    for terms in steps(10):
        weights.update(terms, COUNTS)
    assert float(weights.of("retrieval")) == 0 and weights.state_dict()["known"] == [True, False, True]


def test_one_task_alone_is_refused():
    alone = replace(RECIPE, tasks=TasksConfig(), objective=ObjectiveConfig(task_weights=TaskWeightsConfig("famo")))
    with pytest.raises(ConfigError, match=r"task_weights.method = 'famo' in r.toml: .*caption is the only one"):
        check_recipe(alone, 1, "r.toml")
