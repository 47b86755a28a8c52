"""Builds a recipe's tasks and the model with their heads, and encodes a sample for its tasks."""

from __future__ import annotations

from torch import nn

from dsmoe_vl.config.recipe import Recipe, learned_tasks
from dsmoe_vl.config.task_table import import_class
from dsmoe_vl.data.contents import contents_of, is_offered, offered_tasks
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.task import Task


def build_tasks(recipe: Recipe, tokenizer: Tokenizer, training: bool = True) -> tuple[Task, ...]:
    """All tasks with a weight above 0, in the table's order.

    `training=False`: samples are encoded as they are, without dropout and augmentation.
    """
    reader = MediaReader.of(recipe, training)
    return tuple(
        import_class(spec.task)(reader, tokenizer, getattr(recipe.tasks, spec.name), training)
        for spec in learned_tasks(recipe)
    )


def build_backbone(recipe: Recipe, recompute: str = "none") -> VisionLanguageModel:
    """The recipe's model with the heads of its tasks. Its parameters are not initialised yet."""
    heads: dict[str, nn.Module] = {}
    for spec in learned_tasks(recipe):
        heads |= import_class(spec.task).heads(getattr(recipe.tasks, spec.name), recipe.model.width)
    return VisionLanguageModel(recipe, recompute, heads)


class Encoder:
    """Called by the loader: encodes a sample into the segments of all its tasks.

    A task must be offered the sample (`data/contents.py: is_offered`).
    """

    def __init__(self, tasks: tuple[Task, ...]) -> None:
        self.tasks = tasks

    def __call__(self, sample: Sample) -> list[Segment]:
        """Raises DataError for a sample that no task can use."""
        wanted = sample.source.tasks
        offered = offered_tasks(sample)
        segments: list[Segment] = []
        failure: DataError | None = None  # of the first task: the others may lack more
        for task in self.tasks:
            if is_offered(sample, task.name):
                try:
                    segments += task.encode(sample)
                except DataError as error:
                    if wanted or offered is not None:
                        raise
                    failure = failure or error  # no list asks for this task: try the others
        if not segments:
            names = ", ".join(wanted or [task.name for task in self.tasks])
            own = "" if offered is None else f": `tasks` of KEY.json has {', '.join(offered)}"
            raise failure or DataError(contents_of(sample).no_task or f"serves none of the tasks {names}{own}")
        return segments
