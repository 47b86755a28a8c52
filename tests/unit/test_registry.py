"""Which tasks a sample is used for, by its source, its own list, and the recipe."""

import dataclasses

import pytest

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import SourceConfig, TasksConfig
from dsmoe_vl.config.task_table import TASKS, CaptionConfig, RetrievalConfig, SummaryConfig, task_number
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from tests.support.samples import sample

ALL = TasksConfig(retrieval=RetrievalConfig(1.0), summary=SummaryConfig(1.0))


@pytest.fixture(scope="module")
def tasks(tiny):
    recipe = dataclasses.replace(load_recipe(tiny.recipe), tasks=ALL)
    return build_tasks(recipe, Tokenizer(tiny.data / "tokenizer.model"))


def used_for(encoder, given):
    return [TASKS[segment.task].name for segment in encoder(given)]


def limited(kind, *names, **changes):
    """A sample whose KEY.json lists these tasks."""
    given = sample(kind, **changes)
    return dataclasses.replace(given, meta={**given.meta, "tasks": list(names)})


def test_tasks_with_a_weight_in_a_fixed_order(tiny, tasks):
    assert [task.name for task in tasks] == ["caption", "retrieval", "summary"]
    recipe = load_recipe(tiny.recipe)
    assert [task.name for task in build_tasks(recipe, None)] == ["caption"]
    alone = dataclasses.replace(recipe, tasks=TasksConfig(CaptionConfig(0.0), summary=SummaryConfig(0.5)))
    assert [task.name for task in build_tasks(alone, None)] == ["summary"]


def test_a_sample_serves_all_tasks_unless_limited(tasks):
    for source in (SourceConfig("test"), SourceConfig()):
        found = used_for(Encoder(tasks), sample("video", source=source))
        assert found == ["caption", "retrieval", "retrieval", "summary"]


@pytest.mark.parametrize(
    ("source", "own", "used"),
    [
        (("caption",), None, ["caption"]),
        (("summary", "caption"), None, ["caption", "summary"]),
        ((), ["retrieval"], ["retrieval", "retrieval"]),
        (("caption", "summary"), ["summary", "retrieval"], ["summary"]),
        (("retrieval",), ["retrieval", "something else"], ["retrieval", "retrieval"]),
    ],
)
def test_source_and_sample_limit_the_tasks(tasks, source, own, used):
    wanted = SourceConfig("test", tasks=source)
    given = sample("video", source=wanted) if own is None else limited("video", *own, source=wanted)
    assert used_for(Encoder(tasks), given) == used


@pytest.mark.parametrize(
    ("source", "own", "reason"),
    [
        (("caption",), ["summary"], "serves none of the tasks caption: `tasks` of KEY.json has summary"),
        (("caption", "retrieval"), ["summary"],
         "serves none of the tasks caption, retrieval: `tasks` of KEY.json has summary"),
        ((), [],
         "no task: `tasks` of KEY.json names no task, and the sample can be used for caption, retrieval, summary"),
        ((), ["else"],
         "unknown task: 'else' in `tasks` of KEY.json; the tasks are caption, retrieval, summary, transcript"),
        (("caption",), ["captions"],
         "unknown task: 'captions' in `tasks` of KEY.json; the tasks are caption, retrieval, summary, transcript"),
    ],
)  # fmt: skip
def test_a_sample_that_serves_no_task_is_bad(tasks, source, own, reason):
    with pytest.raises(DataError, match=f"^{reason}$"):
        Encoder(tasks)(limited("video", *own, source=SourceConfig("test", tasks=source)))


def test_a_task_that_is_not_learned_is_not_served(tasks):
    encoder = Encoder(tasks[:1])
    assert used_for(encoder, sample("video", source=SourceConfig(tasks=("caption", "summary")))) == ["caption"]
    with pytest.raises(DataError, match="serves none"):
        encoder(sample("video", source=SourceConfig(tasks=("summary",))))


def test_a_sample_is_decoded_once(tasks):
    caption, media, text, summary = Encoder(tasks)(sample("video"))
    assert [s.task for s in (caption, media, text, summary)] == [0, 1, 1, task_number("summary")]
    for first, second, third in zip(caption.pictures, media.pictures, summary.pictures, strict=True):
        assert first.patches is second.patches is third.patches
    # Frame tokens are those of the summary alone.
    assert {picture.frame_token for s in (caption, media) for picture in s.pictures} == {-1}


def test_another_sample_is_another_picture(tasks):
    reader = tasks[0].reader
    assert isinstance(reader, MediaReader) and all(task.reader is reader for task in tasks)
    one, two = sample("image"), sample("image")
    assert reader.read(one)[1][0].patches is reader.read(one)[1][0].patches
    again = reader.read(two)[1][0].patches
    assert again is not reader.read(one)[1][0].patches and (again == reader.read(one)[1][0].patches).all()
    bad = dataclasses.replace(one, media=b"damaged")
    with pytest.raises(DataError, match="cannot be decoded"):
        reader.read(bad)
    assert len(reader.read(two)[1]) == 1  # an error leaves nothing behind
