"""What whitens the states of retrieval: the matrices, the head that has them, and who may train them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsmoe_vl.config.recipe import PartConfig
from dsmoe_vl.config.task_table import RetrievalConfig
from dsmoe_vl.doctor.splits import shrink
from dsmoe_vl.doctor.whitening import Moments
from dsmoe_vl.planner.trained import count_trained, rules
from dsmoe_vl.tasks.retrieval_head import RetrievalHead
from tests.distributed.train_losses import RECIPE

WIDTH, WIDE, COUNT = 12, 5, 400


def states():
    """With a large mean, and variances from 1 to 1e-4, of which all but the last directions count."""
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    return torch.randn(COUNT, WIDTH) * torch.logspace(0, -2, WIDTH) @ turned + 3 * torch.randn(WIDTH)


def measured(values):
    moments = Moments(WIDTH)
    for part in values.split(150):
        moments.add(part)
    assert moments.count == COUNT
    return moments.whitening(WIDE)


def test_states_have_mean_0_and_covariance_1():
    values = states()
    matrix, bias = measured(values)
    white = F.linear(values, matrix, bias)
    torch.testing.assert_close(white.mean(0), torch.zeros(WIDE), atol=1e-4, rtol=0)
    torch.testing.assert_close(white.t() @ white / COUNT, torch.eye(WIDE), atol=1e-3, rtol=0)
    centred = values - values.mean(0)
    largest = torch.linalg.svd(centred, full_matrices=False)[2][:WIDE]
    assert torch.linalg.matrix_rank(torch.cat((matrix, largest)), rtol=1e-3) == WIDE  # the same directions


def test_a_direction_without_variance_is_not_blown_up():
    values = states()
    values[:, 0] = values[:, 1]
    moments = Moments(WIDTH)
    moments.add(values)
    matrix, _ = moments.whitening(WIDTH)
    largest = torch.linalg.eigvalsh(values.double().t().cov(correction=0))[-1]
    assert matrix.isfinite().all() and matrix.norm(dim=1).max() <= 1.001 * (1e-6 * largest) ** -0.5


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_head_projects_whitened_states(pooling):
    torch.manual_seed(0)
    head = RetrievalHead(WIDTH, RetrievalConfig(1.0, embedding_width=WIDE, pooling=pooling, whiten=True))
    hidden, ends = torch.randn(9, WIDTH), torch.tensor([0, 4, 9], dtype=torch.int32)
    media, text = torch.tensor([3]), torch.tensor([8])
    found = head(hidden, media, text, ends)
    rows = (hidden[3], hidden[8]) if pooling == "last" else (hidden[:4].mean(0), hidden[4:].mean(0))
    for row, side, embedded in zip(rows, ("media", "text"), (found.media, found.text), strict=True):
        whitening, projection = getattr(head, f"{side}_whitening"), getattr(head, side)
        torch.testing.assert_close(embedded[0], F.normalize(projection(whitening(row)), dim=0))


def test_what_whitens_never_trains():
    retrieval = replace(RECIPE.tasks.retrieval, whiten=True)
    recipe = replace(
        RECIPE, tasks=replace(RECIPE.tasks, retrieval=retrieval), train={"heads": PartConfig(freeze=False, lr_scale=2)}
    )
    found = {name: rule for name, rule in rules(recipe).items() if name.startswith("retrieval.")}
    frozen = {name for name, rule in found.items() if rule.freeze}
    sides = [f"retrieval.{side}_whitening" for side in ("media", "text")]
    assert frozen == {f"{side}.{kind}" for side in sides for kind in ("weight", "bias")}
    wide, width = retrieval.embedding_width, recipe.model.width
    assert count_trained(recipe).frozen["heads"] == 2 * wide * (width + 1)
    assert not shrink(recipe).tasks.retrieval.whiten  # a small model has no measured ones
