"""The layout of a caption's segment, on real encoded images and videos."""

import dataclasses

import numpy as np
import pytest

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.task_table import CaptionConfig
from dsmoe_vl.data.segment import IGNORE, Modality
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.tasks.media import MediaReader
from tests.support.samples import sample


@pytest.fixture(scope="module")
def task(tiny):
    recipe = load_recipe(tiny.recipe)
    return CaptionTask(
        MediaReader(recipe.data, recipe.model.vision), Tokenizer(tiny.data / "tokenizer.model"), CaptionConfig()
    )


@pytest.mark.parametrize(("kind", "modality"), [("image", Modality.IMAGE), ("video", Modality.VIDEO)])
def test_layout(task, kind, modality):
    given = sample(kind)
    (segment,) = task.encode(given)
    vision = int((segment.modality == modality).sum())
    assert (segment.modality[:vision] == modality).all() and (segment.modality[vision:] == Modality.TEXT).all()
    assert (segment.tokens[:vision] == task.tokenizer.control(f"<{kind}>")).all()
    assert segment.tokens[vision] == task.tokenizer.control("<caption>")
    assert (segment.labels[:vision] == IGNORE).all()
    text = task.tokenizer.decode(segment.tokens[vision + 1 :].tolist())
    assert text in given.meta["captions"]
    assert segment.labels[vision:].tolist() == [*segment.tokens[vision + 1 :].tolist(), task.tokenizer.eos]
    filled = np.concatenate([picture.cell_token for picture in segment.pictures])
    assert sorted(set(filled.tolist())) == list(range(vision))


def test_a_prompt_is_the_beginning_of_its_segment(task):
    prompt, (segment,) = task.prompt(sample("image")), task.encode(sample("image"))
    assert prompt.tokens.tolist() == segment.tokens[: prompt.length].tolist()
    assert (prompt.labels == IGNORE).all()


def test_captions_take_turns(task):
    given = sample("image")
    texts = []
    for epoch in range(len(given.meta["captions"])):
        (segment,) = task.encode(dataclasses.replace(given, epoch=epoch))
        texts.append(
            task.tokenizer.decode([t for t in segment.labels.tolist() if t not in (IGNORE, task.tokenizer.eos)])
        )
    assert sorted(texts) == sorted(given.meta["captions"])


def test_frames_carry_their_times_and_share_tokens(task):
    pooling = CaptionTask.__new__(CaptionTask)
    pooling.__dict__ |= task.__dict__
    reader = type(task.reader)(dataclasses.replace(task.reader.data, frame_pool=2), task.reader.vision)
    _, pictures, used = reader.read(sample("video"))
    times = [picture.time_seconds for picture in pictures]
    assert len(times) == 4 and times == sorted(times) and times[0] >= 0
    assert used == len(pictures)  # 4 x 4 patches are 2 x 2 cells, pooled to one token a frame
    assert [set(picture.cell_token.tolist()) for picture in pictures] == [{0}, {1}, {2}, {3}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"media": None}, "no image or video"),
        ({"media": b"not a picture"}, "image cannot be decoded"),
        ({"text": " ", "meta": {}}, "^no caption: "),
        ({"text": "", "meta": {"captions": ["", "  "]}}, "^no caption: "),
    ],
)
def test_what_cannot_be_used_says_why(task, changes, message):
    with pytest.raises(DataError, match=message):
        task.encode(sample("image", **changes))


def test_word_dropout_hides_inputs_and_never_targets(task):
    dropping = CaptionTask(task.reader, task.tokenizer, CaptionConfig(word_dropout=0.5))
    given = sample("image")
    (whole,), (dropped,), (again,) = task.encode(given), dropping.encode(given), dropping.encode(given)
    assert dropped.labels.tolist() == whole.labels.tolist()
    hidden = dropped.tokens != whole.tokens
    assert 0 < hidden.sum() < (whole.labels != IGNORE).sum()
    assert (dropped.tokens[hidden] == task.tokenizer.unk).all()
    assert not hidden[: task.prompt(given).length].any()
    assert dropped.tokens.tolist() == again.tokens.tolist()  # a pure function of the sample and the epoch
