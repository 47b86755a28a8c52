"""Records routing: adds up every step on the device and reads back once every `run.router_every` steps."""

from __future__ import annotations

import numpy as np
import torch

from dsmoe_vl.config.task_table import task_rows
from dsmoe_vl.data.segment import TOKENS_OF, Modality
from dsmoe_vl.errors import DataError
from dsmoe_vl.moe.stats import GATE_BINS, RoutingSums
from dsmoe_vl.monitor.router_series import FILE, RouterSeries
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan


class RouterRecorder:
    """Writes `router.npz` of a run. Only rank 0 has one: a step's sums are already over all ranks.

    It reads only the results of optimizer steps, so evaluation and the recomputation of activation checkpointing are
    not counted.
    """

    def __init__(self, plan: RunPlan, first_step: int) -> None:
        self._path = plan.run_dir / FILE
        self._experts = experts_of_layers(plan.recipe)
        model = plan.recipe.model
        self._modalities = tuple(Modality)[: model.modalities]
        self._series = RouterSeries.empty(self._experts, GATE_BINS, task_rows(model.hears), model.modalities)
        if first_step and self._path.exists():
            try:
                self._series = RouterSeries.load_from(self._path).until(first_step)
            except DataError:
                self._path.replace(self._path.with_suffix(".unreadable"))  # a bad file must not stop training
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._sums: list[torch.Tensor] = []
        self._tokens = dict.fromkeys(self._modalities, 0)

    def add(self, routing: RoutingSums, counts: dict[str, int]) -> None:
        """Add the routing and the global counts of one step."""
        # In float64: float32 counts exactly only to 2**24, which an expert may reach in a hundred steps.
        self._sums = (
            [total.add_(new) for total, new in zip(self._sums, routing, strict=True)]
            if self._sums
            else [values.double() for values in routing]
        )
        for modality in self._modalities:
            self._tokens[modality] += counts[TOKENS_OF[modality]]
        self._steps += 1

    def record(self, step: int) -> RouterSeries | None:
        """Write and return the record of all steps since the last one, up to `step`; None if there are none.

        Raises OSError; the next call then writes this record too.
        """
        if not self._steps:
            return None
        sums = RoutingSums(*(values.cpu().unsqueeze(0) for values in self._sums))
        found = RouterSeries(
            experts=np.array(self._experts, np.int64),
            step=np.array([step]),
            steps=np.array([self._steps]),
            tokens=np.array([list(self._tokens.values())]),
            load=_counts(sums.load),
            dropped=_counts(sums.dropped),
            gates=_counts(sums.gates),
            entropy=sums.entropy.numpy(),
            violation=sums.violation.numpy(),
        )
        self._series = self._series.with_record(found)
        self._begin()
        self._series.save(self._path)
        return found


def _counts(values: torch.Tensor) -> np.ndarray:
    return values.round().long().numpy()
