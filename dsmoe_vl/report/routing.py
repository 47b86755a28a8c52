"""Maps of expert load in an evaluation: of all tokens, by task and by modality.

Shapes: N sparse layers, J tasks, M modalities, E experts of the widest layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.data.segment import Modality
from dsmoe_vl.report.charts import LoadMap, load_map
from dsmoe_vl.report.content import Report

_OF_MODALITIES = {
    Modality.TEXT: "text",
    Modality.IMAGE: "images",
    Modality.VIDEO: "video frames",
    Modality.SPEECH: "speech",
}


@dataclass(frozen=True)
class TokenGroup:
    """A group of tokens, the number of its assignments in one layer, and its expert load."""

    name: str
    assignments: float
    chart: LoadMap


@dataclass(frozen=True)
class Routing:
    """`top`: the greatest share of an expert in any map, which has the deepest colour; `widths`: the different numbers
    of experts per layer, the greatest first."""

    top: float
    widths: list[int]
    all_tokens: list[TokenGroup]
    by_task: list[TokenGroup]
    by_modality: list[TokenGroup]


def routing(report: Report) -> Routing | None:
    """The maps of a report. Groups without tokens are left out; None if all are."""
    load = report.load
    if load is None or not load.load.any():
        return None
    everything = [("all tokens", load.load.sum((1, 2)))]
    # A model without a speech encoder has no row for speech and its tasks.
    rows, columns = load.load.shape[1:3]
    tasks = [(_in_sentence(spec.title), load.load[:, number].sum(1)) for number, spec in enumerate(TASKS[:rows])]
    modalities = [(_OF_MODALITIES[kind], load.load[:, :, kind].sum(1)) for kind in list(Modality)[:columns]]
    top = max(float(_shares(sums).max()) for _, sums in everything + tasks + modalities)

    def groups(named: list[tuple[str, np.ndarray]]) -> list[TokenGroup]:
        return [
            TokenGroup(name, float(sums[0].sum()), load_map(_shares(sums), top, load.layers, load.experts))
            for name, sums in named
            if sums.any()
        ]

    widths = sorted(set(load.experts), reverse=True)
    return Routing(top, widths, groups(everything), groups(tasks), groups(modalities))


def _in_sentence(title: str) -> str:
    """A title as within a sentence: "captions", but "COCO captions"."""
    return title[:1].lower() + title[1:] if title[1:2].islower() else title


def _shares(sums: np.ndarray) -> np.ndarray:
    """Shares of each layer's assignments, [N, E]; 0 for a layer without assignments."""
    return sums / np.maximum(sums.sum(1, keepdims=True), 1.0)
