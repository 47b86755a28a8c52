"""`router.npz` of a run: routing statistics by interval. All are sums, so intervals can be added.

Shapes: R records, N MoE layers, J tasks, M modalities, E experts (of the widest layer), B bins.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsmoe_vl.errors import DataError
from dsmoe_vl.files import replacing, require_regular
from dsmoe_vl.moe.stats import LIVE_SHARE

FILE = "router.npz"
RECORDS_AT_MOST = 256  # then the older half is summed in pairs, so that the file stays small in long runs


@dataclass(frozen=True)
class RouterSeries:
    """Arrays with one row per record, in order, except `experts`.

    Counts are exact. `violation` is the mean over the micro-batches of all ranks, summed over steps.
    """

    experts: NDArray[np.int64]  # [N] experts of every layer
    step: NDArray[np.int64]  # [R] last step of the interval
    steps: NDArray[np.int64]  # [R] number of steps in the interval
    tokens: NDArray[np.int64]  # [R, M] without padding
    load: NDArray[np.int64]  # [R, N, J, M, E] computed assignments
    dropped: NDArray[np.int64]  # [R, N] dropped assignments
    gates: NDArray[np.int64]  # [R, N, B] computed assignments by their gate, in equal bins from 0 to 1
    entropy: NDArray[np.float64]  # [R, N, M] nats, summed over tokens
    violation: NDArray[np.float64]  # [R, N]

    @staticmethod
    def empty(experts: tuple[int, ...], bins: int, tasks: int, modalities: int) -> RouterSeries:
        """A series without records."""
        layers = len(experts)
        return RouterSeries(
            experts=np.array(experts, np.int64),
            step=np.zeros(0, np.int64),
            steps=np.zeros(0, np.int64),
            tokens=np.zeros((0, modalities), np.int64),
            load=np.zeros((0, layers, tasks, modalities, max(experts)), np.int64),
            dropped=np.zeros((0, layers), np.int64),
            gates=np.zeros((0, layers, bins), np.int64),
            entropy=np.zeros((0, layers, modalities)),
            violation=np.zeros((0, layers)),
        )

    @staticmethod
    def load_from(path: Path) -> RouterSeries:
        """Read a file. Raises DataError if it is missing or not a router.npz."""
        try:
            with np.load(require_regular(path)) as file:
                return RouterSeries(**{field.name: file[field.name] for field in fields(RouterSeries)})
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist: name a run with MoE layers, run.router_every above 0 and a first record"
            ) from None
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            raise DataError(f"{path} is not a router.npz from training: name another run") from None

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the old or the new file."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **vars(self))

    def __len__(self) -> int:
        return len(self.step)

    def with_record(self, record: RouterSeries) -> RouterSeries:
        """Append a record; older ones are summed in pairs if there are too many."""
        series = self._joined(record)
        if len(series) <= RECORDS_AT_MOST:
            return series
        half = RECORDS_AT_MOST // 2
        return series.rows(slice(0, half)).summed(2)._joined(series.rows(slice(half, None)))

    def until(self, step: int) -> RouterSeries:
        """The records up to `step`: a resumed run takes the later steps again."""
        return self.rows(slice(0, int(np.searchsorted(self.step, step, "right"))))

    def rows(self, which: slice | NDArray[np.intp]) -> RouterSeries:
        """Some of the records."""
        return replace(self, **{name: values[which] for name, values in self._series().items()})

    def summed(self, group: int) -> RouterSeries:
        """Sum every `group` neighbouring records into one; the last may have fewer."""
        starts = np.arange(0, len(self), group)
        ends = np.minimum(starts + group, len(self)) - 1
        series = {name: np.add.reduceat(values, starts) for name, values in self._series().items()}
        return replace(self, **{**series, "step": self.step[ends]})

    def exists(self) -> NDArray[np.bool_]:
        """bool [N, E]: which columns of `load` are an expert."""
        return np.arange(self.load.shape[-1]) < self.experts[:, None]

    def relative_load(self, over: tuple[int, ...] = (2, 3)) -> NDArray[np.float64]:
        """Load over an even share: 1 if routing is even; NaN without expert or without tokens.

        over: the axes of `load` to sum; default: tasks (2) and modalities (3).
        """
        load = self.load.sum(over, keepdims=True).astype(np.float64)
        total = load.sum(-1, keepdims=True)
        shape = (1, -1, 1, 1, 1)
        share = np.divide(load, total, out=np.full_like(load, np.nan), where=total > 0) * self.experts.reshape(shape)
        return np.where(self.exists().reshape(1, -1, 1, 1, load.shape[-1]), share, np.nan).squeeze(over)

    def of_layers(self) -> dict[str, NDArray[np.float64]]:
        """Aggregates [R, N] by name, as in TensorBoard for every layer."""
        share = self.relative_load()
        tokens = np.maximum(self.tokens.sum(1), 1)[:, None]
        assignments = self.load.sum((2, 3, 4)) + self.dropped
        dead = (share < LIVE_SHARE) & self.exists()
        return {
            "max_violation": np.nan_to_num(np.nanmax(share, -1), nan=1.0) - 1,
            "max_violation_micro": self.violation / self.steps[:, None],
            "dead_fraction": dead.sum(-1) / self.experts,
            "entropy": self.entropy.sum(-1) / tokens,
            "drop_fraction": self.dropped / np.maximum(assignments, 1),
        }

    def _series(self) -> dict[str, NDArray]:
        return {name: values for name, values in vars(self).items() if name != "experts"}

    def _joined(self, other: RouterSeries) -> RouterSeries:
        later = other._series()
        return replace(self, **{n: np.concatenate((values, later[n])) for n, values in self._series().items()})
