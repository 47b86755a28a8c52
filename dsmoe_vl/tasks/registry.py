"""The tasks of a recipe, and which of them a sample serves."""

from __future__ import annotations

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.segment import Sample, Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.tasks.task import Task


def build_tasks(recipe: Recipe, tokenizer: Tokenizer) -> tuple[Task, ...]:
    """Every task, in a fixed order."""
    return (CaptionTask(recipe, tokenizer),)


class Encoder:
    """What the loader calls: a sample to the segments of all tasks that it serves."""

    def __init__(self, tasks: tuple[Task, ...]) -> None:
        self.tasks = tasks

    def __call__(self, sample: Sample) -> list[Segment]:
        """Raises DataError for a sample that no task can use."""
        return [segment for task in self.tasks for segment in task.encode(sample)]
