"""The contract of a task: how samples become segments, and how hidden states become loss sums.

Shapes: T tokens of a batch, D width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.segment import Sample, Segment
from dsmoe_vl.model.heads import RetrievalEmbeddings
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.moe.stats import RouterStats


class TaskOutput(NamedTuple):
    """A task's part of one micro-step: sums over this rank's targets, never means.

    `loss_sums` maps a term to a scalar fp32 sum; the number of its targets stands under the same name in
    `Batch.counts`, where it is known before the first forward. `embeddings` are those of this rank's retrieval pairs,
    for the gradient cache. A tuple: ZeRO-3 looks for tensors in tuples only.
    """

    loss_sums: dict[str, Tensor]
    embeddings: RetrievalEmbeddings | None = None


class Task(Protocol):
    """What the trainer knows of a task."""

    name: str  # its table in the recipe's [tasks]
    terms: tuple[str, ...]  # the loss terms it returns

    def encode(self, sample: Sample) -> list[Segment]:
        """Segments of one sample. Raises DataError for a sample that cannot be used."""

    def loss(self, model: VisionLanguageModel, hidden: Tensor, batch: Batch) -> TaskOutput:
        """Loss sums from hidden states [T, D]. Runs inside the module that the engine wraps."""


class MultiTaskModel(nn.Module):
    """The one module that the engine wraps: the backbone and everything of the tasks that touches a parameter."""

    def __init__(self, backbone: VisionLanguageModel, tasks: tuple[Task, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = tasks

    def forward(self, batch: Batch) -> tuple[TaskOutput, RouterStats | None]:
        """One forward a micro-step, whatever mixture of tasks the batch holds."""
        hidden, stats = self.backbone(batch)
        outputs = [task.loss(self.backbone, hidden, batch) for task in self.tasks]
        sums = {term: value for output in outputs for term, value in output.loss_sums.items()}
        return TaskOutput(sums, next((o.embeddings for o in outputs if o.embeddings is not None), None)), stats
