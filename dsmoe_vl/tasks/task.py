"""The interface of a task: samples to segments, and hidden states to loss sums.

Shapes: T tokens of a batch, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.retrieval_head import RetrievalEmbeddings


class TaskOutput(NamedTuple):
    """A task's part of one micro-step: sums over this rank's targets, never means.

    `loss_sums` maps a term to a scalar fp32 sum. `Batch.counts` has its number of targets under the same name, known
    before the first forward. `embeddings`: of this rank's retrieval pairs, for the gradient cache. A tuple, because
    ZeRO-3 looks for tensors only in tuples.
    """

    loss_sums: dict[str, Tensor]
    embeddings: RetrievalEmbeddings | None = None


class Task(Protocol):
    """A task, as the trainer uses it. Its name, settings and loss terms are in `config/task_table.py`."""

    name: str

    def __init__(self, reader: MediaReader, tokenizer: Tokenizer, settings: Any, training: bool = True) -> None:
        """`settings`: its table in the recipe. `training=False`: samples are encoded without dropout."""

    @staticmethod
    def heads(settings: Any, width: int) -> dict[str, nn.Module]:
        """The task's own modules, by their names in the model. They read hidden states of `width`."""

    def encode(self, sample: Sample) -> list[Segment]:
        """Segments of one sample, each `after(tokenizer.begin)`. Raises DataError for a sample that cannot be used."""

    def loss(self, model: VisionLanguageModel, hidden: Tensor, batch: Batch) -> TaskOutput:
        """Loss sums from hidden states [T, D]. Runs inside the module that the engine wraps."""


class MultiTaskModel(nn.Module):
    """The module that the engine wraps: the backbone and all task computation that uses parameters."""

    def __init__(self, backbone: VisionLanguageModel, tasks: tuple[Task, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = tasks

    def forward(self, batch: Batch) -> tuple[TaskOutput, RouterStats | None]:
        """One forward per micro-step, for any mixture of tasks."""
        hidden, stats = self.backbone(batch)
        outputs = [task.loss(self.backbone, hidden, batch) for task in self.tasks]
        sums = {term: value for output in outputs for term, value in output.loss_sums.items()}
        return TaskOutput(sums, next((o.embeddings for o in outputs if o.embeddings is not None), None)), stats
