"""Steps that were skipped because the loss or the gradient was not finite: what was wrong, and how many in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dsmoe_vl.errors import DivergedError
from dsmoe_vl.planner.plan import RunPlan

_NAMED = 5  # samples in a message
_AT_THE_END = 2  # skipped steps in a row that are more than one bad batch


@dataclass(frozen=True)
class Skipped:
    """A skipped step. `names`: the loss terms or parts of the gradient that were not finite; `samples`: keys of the
    samples in micro-steps with such a loss, of all ranks; empty if only the gradient was not finite."""

    names: tuple[str, ...]
    samples: tuple[str, ...]

    @classmethod
    def of_step(cls, terms: Mapping[str, Tensor], norms: Mapping[str, Tensor], samples: tuple[str, ...]) -> Skipped:
        """terms: loss terms over all ranks; norms: of the gradient by part, if known."""
        names = tuple(name for name, value in terms.items() if not math.isfinite(value))
        parts = tuple(part for part, norm in norms.items() if not math.isfinite(norm))
        return cls(names or (f"the gradient of {', '.join(parts)}" if parts else "the gradient",), samples)

    def __str__(self) -> str:
        text = f"{', '.join(self.names)} not finite"
        if self.samples:
            more = len(self.samples) - _NAMED
            text += f", samples {', '.join(self.samples[:_NAMED])}" + (f" and {more} more" if more > 0 else "")
        return text


class SkippedSteps:
    """Counts the skipped steps in a row. Not in a checkpoint: a resumed run begins at 0."""

    def __init__(self, plan: RunPlan) -> None:
        self._most = plan.recipe.run.max_skipped_steps
        self._sources = ", ".join(source.name for source in plan.recipe.data.sources)
        self._last: Skipped | None = None
        self.in_row = 0

    def count(self, skipped: Skipped | None) -> None:
        """Count a step; None: it was not skipped."""
        self.in_row = 0 if skipped is None else self.in_row + 1
        self._last = skipped

    def line(self, step: int) -> str:
        """What is said about the last step, which was skipped."""
        return f"step {step} skipped, {self.in_row} in a row (run.max_skipped_steps = {self._most}): {self._last}"

    def are_too_many(self, is_end: bool) -> bool:
        """Whether the run must end with an error. `is_end`: it ends anyway, and would save these weights."""
        return self.in_row >= (min(_AT_THE_END, self._most) if is_end else self._most)

    def error(self, step: int, saved: int) -> DivergedError:
        """What ends the run at `step`. saved: the step of its newest checkpoint, 0 without one."""
        kept = "There is no checkpoint yet"
        if saved:
            kept = f"The newest checkpoint is of step {saved}; remove it if it fails too, to continue from an older one"
        return DivergedError(
            f"step {step} was skipped as the {_ordinal(self.in_row)} in a row (run.max_skipped_steps = {self._most}), "
            f"data sources {self._sources}: {self._last}. {kept}. Likely a learning rate that is too high: try a lower "
            "optimizer.params.lr, a longer warmup_num_steps and gradient_clipping = 1.0 in the DeepSpeed JSON. If only "
            "some samples do it, remove them, or raise run.max_skipped_steps in the recipe"
        )


def _ordinal(number: int) -> str:
    ending = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
