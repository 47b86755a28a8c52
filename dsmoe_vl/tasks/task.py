"""The contract of a task: how samples become segments, and how hidden states become loss sums.

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
from dsmoe_vl.tasks.pictures import PictureReader
from dsmoe_vl.tasks.retrieval_head import RetrievalEmbeddings


class TaskOutput(NamedTuple):
    """A task's part of one micro-step: sums over this rank's targets, never means.

    `loss_sums` maps a term to a scalar fp32 sum; the number of its targets stands under the same name in
    `Batch.counts`, where it is known before the first forward. `embeddings` are those of this rank's retrieval pairs,
    for the gradient cache. A tuple: ZeRO-3 looks for tensors in tuples only.
    """

    loss_sums: dict[str, Tensor]
    embeddings: RetrievalEmbeddings | None = None


class Task(Protocol):
    """What the trainer knows of a task. Its name, settings and loss terms: `config/task_table.py`."""

    name: str

    def __init__(self, pictures: PictureReader, tokenizer: Tokenizer, settings: Any, training: bool = True) -> None:
        """`settings`: its table in the recipe. Not for `training`: samples are encoded as they are."""

    @staticmethod
    def heads(settings: Any, width: int) -> dict[str, nn.Module]:
        """Modules of its own that read hidden states of that width, by their names in the model."""

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
