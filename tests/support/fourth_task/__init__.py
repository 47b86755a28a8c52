"""A made-up fourth task: how many objects does a picture show? Importing this registers it."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_vl.config.bounds import bounded
from dsmoe_vl.config.task_table import TaskSpec, Term, register


@dataclass(frozen=True)
class CountingConfig:
    """Its table [tasks.counting]."""

    weight: float = bounded(0.0, least=0)
    parity_weight: float = bounded(0.5, least=0)


register(
    TaskSpec(
        name="counting",
        title="Counts of objects",
        symbol="<counting>",
        settings=CountingConfig,
        terms=(Term("counting", "labels"), Term("parity", "labels", weight="parity_weight")),
        qualifies=lambda has, captions, meta: "image" in has and bool(meta.get("attributes")),
        task="tests.support.fourth_task.counting:CountingTask",
        evaluation="tests.support.fourth_task.counting:CountingEvaluation",
        head_shapes=lambda settings, width: {"parity.weight": (1, width), "parity.bias": (1,)},
    )
)
