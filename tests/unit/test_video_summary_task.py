"""The segment of a video summary on real encoded videos, the frames' importance, and the losses over a batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import TasksConfig
from dsmoe_vl.config.task_table import SummaryConfig, task_number
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.data.segment import IGNORE, Modality
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.registry import build_backbone
from dsmoe_vl.tasks.video_summary import VideoSummaryTask, importance_at, ranked_pairs
from tests.support.samples import sample

FRAMES = 4
SHAPE = PackShape(length=192, patches=256, patch_size=8, merge=2)


@pytest.fixture(scope="module")
def recipe(tiny):
    tasks = TasksConfig(summary=SummaryConfig(1.0, ranking_margin=0.05))
    return dataclasses.replace(load_recipe(tiny.recipe), tasks=tasks)


@pytest.fixture(scope="module")
def task(tiny, recipe):
    reader = MediaReader(recipe.data, recipe.model.vision)
    return VideoSummaryTask(reader, Tokenizer(tiny.data / "tokenizer.model"), recipe.tasks.summary)


def described(**meta):
    """A video sample with nothing but these values in KEY.json."""
    return sample("video", meta=meta)


def test_layout(task):
    given = sample("video")
    (segment,) = task.encode(given)
    control = task.tokenizer.control
    vision = segment.tokens.tolist().index(control("<frame>"))
    prompt = vision + FRAMES + 1
    words = segment.tokens[prompt:].tolist()
    assert segment.task == task_number("summary") and segment.pair == -1
    assert segment.tokens[:prompt].tolist() == [
        *[control("<video>")] * vision,
        *[control("<frame>")] * FRAMES,
        control("<summary>"),
    ]
    assert segment.modality.tolist() == [Modality.VIDEO] * (prompt - 1) + [Modality.TEXT] * (1 + len(words))
    assert task.tokenizer.decode(words) == given.meta["summary"]
    assert segment.labels.tolist() == [IGNORE] * (prompt - 1) + [*words, task.tokenizer.eos]
    filled = np.concatenate([picture.cell_token for picture in segment.pictures])
    assert sorted(set(filled.tolist())) == list(range(vision))
    assert [picture.frame_token for picture in segment.pictures] == list(range(vision, vision + FRAMES))


def test_frames_have_the_importance_of_their_time(task):
    for number in range(3):
        given = sample("video", number=number)
        (segment,) = task.encode(given)
        shown = [round(picture.time_seconds * given.meta["fps"]) for picture in segment.pictures]
        truth = np.array(given.meta["importance"], np.float32)[shown]
        np.testing.assert_array_equal(segment.importance, truth)
        assert segment.ranked.tolist() == ranked_pairs(truth, 0.05).tolist() != []


def test_a_prompt_is_the_beginning_of_its_segment(task):
    prompt, (segment,) = task.prompt(sample("video")), task.encode(sample("video"))
    assert prompt.tokens.tolist() == segment.tokens[: prompt.length].tolist()
    assert (prompt.labels == IGNORE).all()
    without = task.prompt(described())  # a video to be summarized needs neither
    assert len(without.importance) == 0 and len(without.pictures) == FRAMES


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("image", {}, "no summary"),
        ("image", {"meta": {"summary": "a dog"}}, "no video to summarize"),
        ("video", {"media": None}, "no image or video"),
        ("video", {"media": b"not a video"}, "video cannot be decoded"),
        ("video", {"meta": {"summary": " "}}, "no summary"),
        ("video", {"meta": {"summary": "a dog"}}, "no importance of frames"),
    ],
)
def test_what_cannot_be_used_says_why(task, kind, changes, message):
    with pytest.raises(DataError, match=message):
        task.encode(sample(kind, **changes))


def test_null_is_no_summary(task):
    given = sample("video")
    with pytest.raises(DataError, match="no summary"):
        task.encode(dataclasses.replace(given, meta={**given.meta, "summary": None}))


def test_importance_of_equal_parts():
    given = described(importance=[0.1, 0.2, 0.9, 0.4], duration_seconds=8)
    found = importance_at(given, [0.0, 1.9, 2.0, 5.5, 7.9, 8.0, 100.0])
    np.testing.assert_array_equal(found, np.array([0.1, 0.1, 0.2, 0.9, 0.4, 0.4, 0.4], np.float32))
    assert found.dtype == np.float32


def test_importance_is_the_annotators_mean():
    given = described(saliency=[[0.0, 0.5], [1.0, 0.5], [0.5, 0.8]], importance=[0.9, 0.9], duration_seconds=2.0)
    np.testing.assert_allclose(importance_at(given, [0.5, 1.5]), [0.5, 0.6], rtol=1e-6)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "no importance"),
        ({"importance": [0.5]}, "no importance"),
        ({"duration_seconds": 2.0}, "no importance"),
        ({"importance": [], "duration_seconds": 2.0}, "no importance"),
        ({"saliency": [[]], "duration_seconds": 2.0}, "no importance"),
        ({"importance": None, "duration_seconds": 2.0}, "no importance"),
        ({"importance": "much", "duration_seconds": 2.0}, "no importance"),
        ({"importance": [0.5, math.nan], "duration_seconds": 2.0}, "no importance"),
        ({"importance": [0.5, math.inf], "duration_seconds": 2.0}, "no importance"),
        ({"saliency": [[0.5, 0.5], [0.5]], "duration_seconds": 2.0}, "no importance"),
        ({"importance": [0.5], "duration_seconds": 0}, "no importance"),
        ({"importance": [0.5], "duration_seconds": -1}, "no importance"),
        ({"importance": [0.5], "duration_seconds": math.nan}, "no importance"),
        ({"importance": [0.5], "duration_seconds": None}, "no importance"),
        ({"importance": [0.5], "duration_seconds": "long"}, "no importance"),
        ({"importance": [0.5, 1.5], "duration_seconds": 2.0}, r"outside of 0 to 1: 0\.5 to 1\.5"),
        ({"saliency": [[0.5, 0.5], [-0.25, 1]], "duration_seconds": 2.0}, r"outside of 0 to 1: -0\.25 to 1"),
    ],
)
def test_importance_that_cannot_be_used(meta, message):
    with pytest.raises(DataError, match=message):
        importance_at(described(**meta), [0.0, 1.0])


@pytest.mark.parametrize("frames", [22, 23, 26])
def test_every_frame_has_a_part_of_its_own(frames):
    """As the synthetic films have it: one number a frame."""
    parts = [i / 100 for i in range(frames)]
    given = described(importance=parts, duration_seconds=frames / 8)
    np.testing.assert_array_equal(importance_at(given, [i / 8 for i in range(frames)]), np.array(parts, np.float32))


def test_saliency_has_two_dimensions():
    given = described(saliency=[[[0.1, 0.2], [0.3, 0.4]]], duration_seconds=2.0)
    with pytest.raises(DataError, match="no importance"):
        importance_at(given, [0.0, 1.0])


def test_ranked_pairs():
    pairs = ranked_pairs(np.array([0.5, 0.9, 0.25, 0.5], np.float32), 0.25)
    # 0.9 over the three others; 0.5 is above 0.25 by the margin and not by more.
    assert pairs.tolist() == [[1, 0], [1, 2], [1, 3]]
    assert pairs.dtype == np.int32
    for same in (np.full(4, 0.5, np.float32), np.array([0.5], np.float32)):
        assert ranked_pairs(same, 0.1).shape == (0, 2)


def test_losses_of_a_batch_against_loops(task, recipe):
    """Two packs, of two videos and of one."""
    segments = [task.encode(sample("video", number=number))[0] for number in range(3)]
    packs = [segments[:2], segments[2:]]
    batch = collate([assemble(pack, SHAPE) for pack in packs])
    torch.manual_seed(0)
    model = build_backbone(recipe)
    hidden = torch.randn(2 * SHAPE.length, recipe.model.width)
    sums = task.loss(model, hidden, batch).loss_sums

    summary = importance = ranking = 0.0
    targets = pairs = 0
    for number, pack in enumerate(packs):
        start = SHAPE.length * number
        for segment in pack:
            scores = []
            for picture, truth in zip(segment.pictures, segment.importance, strict=True):
                scores.append(model.importance.score(hidden[start + picture.frame_token]).squeeze())
                importance = importance + (scores[-1].sigmoid() - float(truth)) ** 2
            for more in range(FRAMES):
                for less in range(FRAMES):
                    if segment.importance[more] - segment.importance[less] > 0.05:
                        ranking = ranking - torch.log(torch.sigmoid(scores[more] - scores[less]))
                        pairs += 1
            for at, label in enumerate(segment.labels.tolist()):
                if label != IGNORE:
                    logits = model.embedding.weight @ hidden[start + at]
                    summary = summary + F.cross_entropy(logits, torch.tensor(label))
                    targets += 1
            start += segment.length
    counts = {name: batch.counts[name] for name in ("summary", "importance", "ranking")}
    assert counts == {"summary": targets, "importance": 3 * FRAMES, "ranking": pairs} and pairs > 3
    for name, expected in (("summary", summary), ("importance", importance), ("ranking", ranking)):
        torch.testing.assert_close(sums[name], expected, rtol=1e-5, atol=1e-5)


def test_a_batch_without_videos_has_losses_of_zero(task, recipe):
    model = build_backbone(recipe)
    hidden = torch.randn(SHAPE.length, recipe.model.width, requires_grad=True)
    sums = task.loss(model, hidden, collate([assemble([], SHAPE)])).loss_sums
    assert {name: value.item() for name, value in sums.items()} == {"summary": 0, "importance": 0, "ranking": 0}
    sum(sums.values()).backward()  # the head takes part in the backward of every rank
    assert torch.equal(model.importance.score.weight.grad, torch.zeros(1, recipe.model.width))
