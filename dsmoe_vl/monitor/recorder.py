"""The routers' flight recorder: adds up every step on the device and reads back once in `run.router_every` steps."""

from __future__ import annotations

import numpy as np
import torch

from dsmoe_vl.data.segment import TOKENS_OF, Modality
from dsmoe_vl.errors import DataError
from dsmoe_vl.moe.stats import GATE_BINS, RoutingSums
from dsmoe_vl.monitor.router_series import FILE, RouterSeries
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan


class RouterRecorder:
    """Keeps `router.npz` of a run. Only rank 0 has one: a step's sums are over all ranks already.

    It sees what the optimizer steps return, and nothing else: evaluation passes and the recomputation of activation
    checkpointing cannot be counted.
    """

    def __init__(self, plan: RunPlan, first_step: int) -> None:
        self._path = plan.run_dir / FILE
        self._experts = experts_of_layers(plan.recipe)
        self._series = RouterSeries.empty(self._experts, GATE_BINS)
        if first_step and self._path.exists():
            try:
                self._series = RouterSeries.load_from(self._path).until(first_step)
            except DataError:
                self._path.replace(self._path.with_suffix(".unreadable"))  # a recorder ends no training
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._sums: list[torch.Tensor] = []
        self._tokens = dict.fromkeys(Modality, 0)

    def add(self, routing: RoutingSums, counts: dict[str, int]) -> None:
        """One step: its routing and its global counts."""
        # In float64: float32 counts exactly to 2**24 only, which an expert may see in a hundred steps.
        self._sums = (
            [total.add_(new) for total, new in zip(self._sums, routing, strict=True)]
            if self._sums
            else [values.double() for values in routing]
        )
        for modality in Modality:
            self._tokens[modality] += counts[TOKENS_OF[modality]]
        self._steps += 1

    def record(self, step: int) -> RouterSeries | None:
        """Write what came since the last record, as ending with `step`, and return it; None where nothing came."""
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
        self._series.save(self._path)
        self._begin()
        return found


def _counts(values: torch.Tensor) -> np.ndarray:
    return values.round().long().numpy()
