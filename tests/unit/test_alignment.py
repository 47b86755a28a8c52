"""What aligns the states of retrieval: the matrices, the head that has them, and who may train them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsmoe_vl.config.recipe import PartConfig
from dsmoe_vl.config.task_table import RetrievalConfig
from dsmoe_vl.doctor.alignment import Measured, Moments, mean_reciprocal_rank
from dsmoe_vl.doctor.splits import shrink
from dsmoe_vl.planner.trained import count_trained, rules
from dsmoe_vl.tasks.retrieval_head import RetrievalHead
from tests.distributed.train_losses import RECIPE

WIDTH, WIDE, COUNT = 12, 4, 600
NONE = [(torch.eye(WIDTH), torch.zeros(WIDTH))] * 2


def pairs(count=COUNT, noise=0.3):
    """States that share WIDE weak directions, under a large mean and larger directions of their own."""
    torch.manual_seed(0)
    common = torch.randn(count, WIDE)
    sides = []
    for _ in range(2):
        own = torch.randn(count, WIDTH - WIDE) * 5
        parts = torch.cat((common + noise * torch.randn(count, WIDE), own), 1)
        sides.append(parts @ torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] + 3 * torch.randn(WIDTH))
    return sides


def moments_of(media, text):
    moments = Moments(WIDTH)
    for part in zip(media.split(150), text.split(150), strict=True):
        moments.add(*part)
    assert moments.count == len(media)
    return moments


def test_correlations_are_those_of_a_direct_computation():
    """QR and SVD of the centred states (Björck and Golub 1973) give the same correlations without covariances."""
    media, text = (side.double() for side in pairs())
    found = moments_of(media, text).correlation().matrices(WIDTH, (0.0, 0.0))
    sides = [F.linear(side, *(part.double() for part in pair)) for side, pair in zip((media, text), found, strict=True)]
    orthogonal = [np.linalg.qr((side - side.mean(0)).numpy())[0] for side in (media, text)]
    correlations = torch.from_numpy(np.linalg.svd(orthogonal[0].T @ orthogonal[1])[1])
    for side in sides:
        torch.testing.assert_close(side.mean(0), torch.zeros(WIDTH).double(), atol=1e-4, rtol=0)
        covariance = side.t() @ side / COUNT  # each direction as strong as its correlation
        torch.testing.assert_close(covariance, torch.diag(correlations**2), atol=1e-4, rtol=0)
    torch.testing.assert_close(sides[0].t() @ sides[1] / COUNT, torch.diag(correlations**3), atol=1e-4, rtol=0)


def test_pairs_that_were_not_measured_find_each_other():
    media, text = pairs(noise=0.1)
    measured = Measured(WIDTH)
    for start in range(0, 500, 100):
        part = slice(start, start + 100)
        measured.add(media[part], text[part], torch.arange(start, start + 100))
    found = measured.alignment(WIDE)
    assert (found.pairs, found.held_back) == (500, 50) and measured.moments.count == 500
    new = (media[500:], text[500:], torch.arange(100))
    before, after = (mean_reciprocal_rank(*new, matrices) for matrices in (NONE, found.matrices))
    assert before < 0.1 and after > 0.6 and found.reciprocal_rank > 0.6


def test_with_noise_alone_more_shrinkage_is_chosen():
    torch.manual_seed(1)
    clean, noisy = (Measured(WIDTH) for _ in range(2))
    clean.add(*pairs(noise=0.01), torch.arange(COUNT))
    noisy.add(*pairs(noise=3.0), torch.arange(COUNT))
    assert max(clean.alignment(WIDE).shrinkages) < max(noisy.alignment(WIDE).shrinkages)


def test_equal_contents_are_held_back_together():
    measured = Measured(WIDTH)
    contents = torch.arange(60) // 3
    measured.add(*pairs(60), contents)
    assert set(torch.cat([held[2] for held in measured.held]).tolist()) == {0, 10}
    media = text = torch.eye(WIDTH)[:2].repeat_interleave(2, 0)
    assert mean_reciprocal_rank(media, text, torch.tensor([0, 0, 1, 1]), NONE) == 1.0


def test_a_direction_without_variance_is_not_blown_up():
    media, text = pairs()
    media[:, 0] = media[:, 1]
    (matrix, bias), _ = moments_of(media, text).correlation().matrices(WIDE, (0.003, 0.003))
    mean_variance = media.double().var(0, correction=0).mean()
    assert matrix.isfinite().all() and bias.isfinite().all()
    assert matrix.norm(dim=1).max() <= 1.001 * (0.003 * mean_variance) ** -0.5


def test_without_contents_to_hold_back():
    measured = Measured(WIDTH)
    measured.add(*pairs(40), torch.full((40,), 7))
    found = measured.alignment(WIDE)
    assert found.held_back == 0 and list(found.shrinkages) == [0.1, 0.1]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_head_projects_aligned_states(pooling):
    torch.manual_seed(0)
    head = RetrievalHead(WIDTH, RetrievalConfig(1.0, embedding_width=WIDE, pooling=pooling, align=True))
    hidden, ends = torch.randn(9, WIDTH), torch.tensor([0, 4, 9], dtype=torch.int32)
    media, text = torch.tensor([3]), torch.tensor([8])
    found = head(hidden, media, text, ends)
    rows = (hidden[3], hidden[8]) if pooling == "last" else (hidden[:4].mean(0), hidden[4:].mean(0))
    for row, side, embedded in zip(rows, (head.media, head.text), (found.media, found.text), strict=True):
        torch.testing.assert_close(embedded[0], F.normalize(F.linear(side.alignment(row), side.weight), dim=0))


def test_what_aligns_never_trains():
    retrieval = replace(RECIPE.tasks.retrieval, align=True)
    recipe = replace(
        RECIPE, tasks=replace(RECIPE.tasks, retrieval=retrieval), train={"heads": PartConfig(freeze=False, lr_scale=2)}
    )
    found = {name: rule for name, rule in rules(recipe).items() if name.startswith("retrieval.")}
    frozen = {name for name, rule in found.items() if rule.freeze}
    sides = [f"retrieval.{side}.alignment" for side in ("media", "text")]
    assert frozen == {f"{side}.{kind}" for side in sides for kind in ("weight", "bias")}
    wide, width = retrieval.embedding_width, recipe.model.width
    assert count_trained(recipe).frozen["heads"] == 2 * wide * (width + 1)
    assert not shrink(recipe).tasks.retrieval.align  # a small model has no measured ones
