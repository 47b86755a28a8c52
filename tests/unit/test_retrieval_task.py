"""The two segments of a retrieval pair, on real encoded images and videos, and the loss over a batch of them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import SourceConfig, TasksConfig
from dsmoe_vl.config.task_table import RetrievalConfig, task_number
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import IGNORE, Modality
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.registry import build_backbone
from dsmoe_vl.tasks.retrieval import RetrievalTask, pair_id
from tests.support.samples import sample

SHAPE = PackShape(length=128, patches=256, patch_size=8, merge=2)


@pytest.fixture(scope="module")
def recipe(tiny):
    return dataclasses.replace(
        load_recipe(tiny.recipe), tasks=TasksConfig(retrieval=RetrievalConfig(1.0, embedding_width=8))
    )


@pytest.fixture(scope="module")
def task(tiny, recipe):
    reader = MediaReader(recipe.data, recipe.model.vision)
    return RetrievalTask(reader, Tokenizer(tiny.data / "tokenizer.model"), recipe.tasks.retrieval)


@pytest.mark.parametrize(("kind", "modality"), [("image", Modality.IMAGE), ("video", Modality.VIDEO)])
def test_layout(task, kind, modality):
    given = sample(kind)
    media, text = task.encode(given)
    embed = task.tokenizer.control("<embed>")
    vision = media.length - 1
    assert media.tokens.tolist() == [task.tokenizer.control(f"<{kind}>")] * vision + [embed]
    assert media.modality.tolist() == [modality] * vision + [Modality.TEXT]
    filled = np.concatenate([picture.cell_token for picture in media.pictures])
    assert sorted(set(filled.tolist())) == list(range(vision))
    assert task.tokenizer.decode(text.tokens[:-1].tolist()) in given.meta["captions"]
    assert text.tokens[-1] == embed
    assert (text.modality == Modality.TEXT).all() and text.pictures == []
    for side in (media, text):
        assert side.task == task_number("retrieval") and side.pair == pair_id(given)
        assert (side.labels == IGNORE).all() and len(side.labels) == side.length
        assert len(side.importance) == len(side.ranked) == 0
        assert {side.tokens.dtype, side.labels.dtype, side.modality.dtype} == {np.dtype(np.int32)}


def test_captions_take_turns(task):
    given = sample("image")
    epochs = [dataclasses.replace(given, epoch=epoch) for epoch in range(len(given.meta["captions"]))]
    texts = [task.tokenizer.decode(task.encode(each)[1].tokens[:-1].tolist()) for each in epochs]
    assert sorted(texts) == sorted(given.meta["captions"])


def test_a_side_alone_is_that_of_the_pair(task):
    given = sample("video")
    media, text = task.encode(given)
    assert task.media(given).tokens.tolist() == media.tokens.tolist()
    alone = task.text(task.tokenizer.decode(text.tokens[:-1].tolist()))
    assert alone.tokens.tolist() == text.tokens.tolist()


def test_a_pair_has_the_id_of_what_it_shows():
    def id_of(key, source="test", **meta):
        return pair_id(Sample(key, SourceConfig(source), 0, None, "", "words", meta))

    assert id_of("a") == id_of("a") != id_of("b")
    assert id_of("a") != id_of("a", source="elsewhere")
    assert id_of("a", id="photo") == id_of("b", id="photo") != id_of("b", id="photo", source="elsewhere")
    assert id_of("a", id=1, content="red ring") == id_of("b", "elsewhere", id=2, content="red ring")
    many = [id_of(f"{i:07d}") for i in range(5000)]
    assert len(set(many)) == 5000 and min(many) >= 0 and max(many) < 2**63


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"media": None}, "no image or video"),
        ({"media": b"not a picture"}, "image cannot be decoded"),
        ({"text": " ", "meta": {}}, "^no caption: "),
    ],
)
def test_what_cannot_be_used_says_why(task, changes, message):
    with pytest.raises(DataError, match=message):
        task.encode(sample("image", **changes))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_loss_of_a_batch_against_loops(task, recipe, pooling):
    """Two packs with three pairs, of which two show the same picture."""
    settings = dataclasses.replace(recipe.tasks.retrieval, pooling=pooling)
    recipe = dataclasses.replace(recipe, tasks=dataclasses.replace(recipe.tasks, retrieval=settings))
    given = [sample("image"), sample("video", number=1), sample("image", epoch=1)]
    packs = [[*task.encode(given[0]), *task.encode(given[1])], task.encode(given[2])]
    batch = collate([assemble(segments, SHAPE) for segments in packs])
    torch.manual_seed(0)
    model = build_backbone(recipe)
    hidden = torch.randn(2 * SHAPE.length, recipe.model.width)
    output = task.loss(model, hidden, batch)

    states, start = [], 0  # of every segment
    for pack, segments in enumerate(packs):
        start = SHAPE.length * pack
        for segment in segments:
            of_segment = hidden[start : start + segment.length]
            states.append(of_segment[-1] if pooling == "last" else of_segment.mean(0))
            start += segment.length
    media = [F.normalize(model.retrieval.media(state), dim=0) for state in states[::2]]
    text = [F.normalize(model.retrieval.text(state), dim=0) for state in states[1::2]]
    scale, expected = model.retrieval.log_scale.exp(), 0.0
    for i in range(3):
        allowed = [j for j in range(3) if j == i or {i, j} != {0, 2}]
        for rows in ([media[i] @ text[j] for j in allowed], [text[i] @ media[j] for j in allowed]):
            right = torch.tensor(allowed.index(i))
            expected = expected + 0.5 * F.cross_entropy(scale * torch.stack(rows), right)
    assert batch.counts["retrieval"] == 3
    torch.testing.assert_close(output.loss_sums["retrieval"], expected)
    torch.testing.assert_close(output.embeddings.media, torch.stack(media))
    torch.testing.assert_close(output.embeddings.text, torch.stack(text))


def test_the_gradient_cache_has_the_loss_in_training_only(task, recipe):
    cached = RetrievalTask(task.reader, task.tokenizer, dataclasses.replace(task.settings, gradient_cache=True))
    batch = collate([assemble(cached.encode(sample("image")), SHAPE)])
    model = build_backbone(recipe)
    hidden = torch.zeros(SHAPE.length, recipe.model.width)
    assert cached.loss(model.train(), hidden, batch).loss_sums == {}
    assert set(cached.loss(model.eval(), hidden, batch).loss_sums) == {"retrieval"}
