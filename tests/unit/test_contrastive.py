"""The contrastive losses against plain loops, however their rows are split, and against CLIP's in transformers."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsmoe_vl.tasks.contrastive import info_nce_sum, negative_pairs, sigmoid_sum

WIDTH = 6
IDS = [3, 3, 1, 2, 1, 5, 3]  # pairs 0, 1 and 6 show the same, and so do 2 and 4
N = len(IDS)


def inputs(seed=0):
    """media and text [N, W] of unit length, scale and bias [1], all to be differentiated, and the ids."""
    generator = torch.Generator().manual_seed(seed)
    media, text = (F.normalize(torch.randn(N, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return [x.requires_grad_() for x in (media, text, torch.tensor([4.0]), torch.tensor([-3.0]))], torch.tensor(IDS)


def loss(kind, values, ids, first, count):
    """Ours, of rows first .. first + count against all."""
    media, text, scale, bias = values
    own = slice(first, first + count)
    negatives = negative_pairs(ids[own], ids)
    if kind == "sigmoid":
        return sigmoid_sum(media[own], text, scale, bias, negatives, first)
    return info_nce_sum(media[own], text[own], media, text, scale, negatives, first)


def oracle(kind, values, ids):
    """The sum over all pairs, one similarity at a time."""
    media, text, scale, bias = values
    total = 0.0
    for i in range(len(ids)):
        others = [j for j in range(len(ids)) if ids[j] != ids[i]]
        if kind == "sigmoid":
            total = total - torch.log(torch.sigmoid(scale * (media[i] @ text[i]) + bias))
            for j in others:
                total = total - torch.log(torch.sigmoid(-(scale * (media[i] @ text[j]) + bias)))
        else:
            for query, keys in ((media[i], text), (text[i], media)):
                right = torch.exp(scale * (query @ keys[i]))
                wrong = sum(torch.exp(scale * (query @ keys[j])) for j in others)
                total = total - 0.5 * torch.log(right / (right + wrong))
    return total.squeeze()


def gradients(value, values):
    found = torch.autograd.grad(value, values, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, values, strict=True)]


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_value_and_gradients_against_loops(kind):
    values, ids = inputs()
    ours, expected = loss(kind, values, ids, 0, N), oracle(kind, values, ids)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(gradients(ours, values), gradients(expected, values), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("rows", [(3, 4), (0, 7), (7, 0), (1, 0, 4, 2)])
def test_parts_of_ranks_add_up(kind, rows):
    values, ids = inputs()
    whole = loss(kind, values, ids, 0, N)
    parts = [loss(kind, values, ids, sum(rows[:rank]), count) for rank, count in enumerate(rows)]
    torch.testing.assert_close(sum(parts), whole)
    of_parts = [gradients(part, values) for part in parts]
    for of_each, expected in zip(zip(*of_parts, strict=True), gradients(whole, values), strict=True):
        torch.testing.assert_close(sum(of_each), expected)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("total", [0, N])
def test_no_rows_of_ours(kind, total):
    """Zero, with gradients of zero, so that this rank takes part in every backward."""
    values, ids = inputs()
    fewer = [values[0][:total], values[1][:total], *values[2:]]
    nothing = loss(kind, fewer, ids[:total], total, 0)
    assert nothing == 0 and nothing.requires_grad
    nothing.backward()
    assert all(value.grad is None or not value.grad.any() for value in values)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_pairs_of_the_same_picture_do_not_repel(kind):
    """All pairs show the same: InfoNCE has nothing to tell apart, the sigmoid loss only pairs to pull together."""
    (media, text, scale, bias), _ = inputs()
    value = loss(kind, (media, text, scale, bias), torch.zeros(N, dtype=torch.int64), 0, N)
    pulled = -F.logsigmoid(scale * (media * text).sum(-1) + bias).sum()
    torch.testing.assert_close(value, pulled if kind == "sigmoid" else torch.tensor(0.0))


def test_by_hand():
    """Two pairs whose sides are equal and orthogonal to the others."""
    unit, scale, bias = torch.eye(2), torch.tensor([2.0]), torch.tensor([-1.0])
    negatives = negative_pairs(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert negatives.tolist() == [[False, True], [True, False]]
    expected = 2 * math.log((math.exp(2) + 1) / math.exp(2))
    assert info_nce_sum(unit, unit, unit, unit, scale, negatives, 0).item() == pytest.approx(expected)
    expected = 2 * math.log(1 + math.exp(-1)) + 2 * math.log(1 + math.exp(-1))  # logits 1 of pairs, -1 of others
    assert sigmoid_sum(unit, unit, scale, bias, negatives, 0).item() == pytest.approx(expected)


def test_info_nce_equals_clip():
    """CLIP knows no ids and takes the mean, so N different ids, and its value times N."""
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss  # takes seconds

    (media, text, scale, bias), _ = inputs()
    ours = loss("info_nce", (media, text, scale, bias), torch.arange(N), 0, N)
    torch.testing.assert_close(ours, N * image_text_contrastive_loss(scale * text @ media.t()))
