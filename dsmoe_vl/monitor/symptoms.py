"""Signs of trouble in the logged values, each with its likely cause and the setting to try.

Every sign is a pure function of the lines logged so far (values by name, the newest last) that returns a sentence or
None. Most signs need several lines in a row, so that one bad interval gives no warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.planner.parameters import experts_of_layers

LASTING = 5  # lines that a state must last
_DEAD = 0.25  # fraction of dead experts
_VIOLATION = 0.8  # fraction of the value that one expert with all tokens gives
_ENTROPY = 0.05  # fraction of even routing's entropy
_WAIT = 0.2  # fraction of the step time
_STILL_LINES, _STILL_STEPS, _STILL_FALL = 20, 200, 0.01  # lines and steps in which a loss must fall by this fraction
_EXPLODING = 10.0  # times the median
_KEPT = 400  # lines kept

Line = dict[str, float]


@dataclass(frozen=True)
class Facts:
    """Facts of a run that the signs need: its routing, and whether its lines begin with its first step."""

    experts: int  # of the widest layer; 0: dense
    top_k: int
    task_routing: bool  # the recipe sends all tokens of a task to the same experts
    from_start: bool


def non_finite(lines: Sequence[Line], facts: Facts) -> str | None:
    """A loss or a gradient norm that is not finite."""
    last = lines[-1]
    names = [name for name in last if name.startswith(("loss", "grad_norm", "z_loss", "balance_loss"))]
    wrong = [name for name in names if not math.isfinite(last[name])]
    if not wrong:
        return None
    return (
        f"{', '.join(wrong)} not finite: the weights are lost. Likely a learning rate that is too high, or one bad "
        "sample. Continue from the last checkpoint with a lower optimizer.params.lr, a longer warmup_num_steps and "
        "gradient_clipping = 1.0 in the DeepSpeed JSON"
    )


def exploding_gradient(lines: Sequence[Line], facts: Facts) -> str | None:
    """A gradient norm far above its median."""
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    if len(norms) <= LASTING or not math.isfinite(norms[-1]):
        return None
    usual = median(norms[:-1])
    if usual <= 0 or norms[-1] < _EXPLODING * usual:
        return None
    return (
        f"grad_norm is {norms[-1]:.3g}, {norms[-1] / usual:.0f} times its median so far. Likely a learning rate that "
        "is too high for this batch size. Try a lower optimizer.params.lr, a longer warmup_num_steps or a smaller "
        "gradient_clipping in the DeepSpeed JSON"
    )


def collapsing_router(lines: Sequence[Line], facts: Facts) -> str | None:
    """Experts without tokens, or one with nearly all of them."""
    recent = [line for line in lines if "max_violation" in line][-LASTING:]
    if len(recent) < LASTING or facts.experts <= facts.top_k or facts.task_routing:
        return None
    worst, even = facts.experts / facts.top_k - 1, math.log(facts.experts)
    signs = []
    if all(line["dead_fraction"] >= _DEAD for line in recent):
        signs.append(f"{100 * recent[-1]['dead_fraction']:.0f} % of the experts are dead")
    if all(line["max_violation"] >= _VIOLATION * worst for line in recent):
        signs.append(f"the busiest expert has {recent[-1]['max_violation'] + 1:.1f} times an even share")
    if all(line["entropy"] <= _ENTROPY * even for line in recent) and signs:
        signs.append(f"the entropy of a token's routing is {recent[-1]['entropy']:.3f} nats of {even:.2f}")
    if not signs:
        return None
    return (
        f"the router collapses: {', '.join(signs)}. Likely balancing that is too weak for this learning rate. Try a "
        "larger moe.balance_weight or moe.z_weight, or moe.bias_rate = 0.001; see moe/load in TensorBoard"
    )


def starving_loader(lines: Sequence[Line], facts: Facts) -> str | None:
    """Steps that wait for data."""
    recent = [line for line in lines if "data_wait_ms" in line][-LASTING:]
    if len(recent) < LASTING or any(line["data_wait_ms"] < _WAIT * line["step_ms"] for line in recent):
        return None
    share = sum(line["data_wait_ms"] for line in recent) / sum(line["step_ms"] for line in recent)
    return (
        f"{100 * share:.0f} % of a step is waiting for data. Likely too few loader processes, large pictures or slow "
        "storage. Try more data.workers, shards with smaller pictures (data_tools.convert --max-side), or shards on a "
        "local disk"
    )


def still_loss(lines: Sequence[Line], facts: Facts) -> str | None:
    """A task's loss that has not fallen since the first step. Not for resumed runs, which do not know that step."""
    if not facts.from_start:
        return None
    names = sorted({name for line in lines for name in line if name.startswith("loss_")})
    still = []
    for name in names:
        having = [line for line in lines if name in line and math.isfinite(line[name])]
        if len(having) < _STILL_LINES or having[-1]["step"] - having[0]["step"] < _STILL_STEPS:
            continue
        early = median(line[name] for line in having[:LASTING])
        late = median(line[name] for line in having[-LASTING:])
        if late > early * (1 - _STILL_FALL):
            still.append(f"{name} ({early:.3f} at first, {late:.3f} now)")
    if not still:
        return None
    return (
        f"{', '.join(still)} does not fall. Likely a task weight that is too low, few samples of the task in the "
        "mixture, or a learning rate that is too low. Try a larger weight in [tasks.NAME], a larger weight of its "
        "sources, or another optimizer.params.lr; `launch/doctor.py objective` checks the gradients"
    )


SIGNS: tuple[Callable[[Sequence[Line], Facts], str | None], ...] = (
    non_finite,
    exploding_gradient,
    collapsing_router,
    starving_loader,
    still_loss,
)


class Watch:
    """Checks every line for signs, and reports each one at most once in `_pause` steps."""

    def __init__(self, recipe: Recipe, first_step: int) -> None:
        moe, experts = recipe.moe, experts_of_layers(recipe)
        self._facts = Facts(max(experts, default=0), moe.top_k, moe.routing == "task", first_step == 0)
        self._pause = max(100, 20 * recipe.run.log_every)
        self._lines: list[Line] = []
        self._told: dict[str, float] = {}

    def look(self, step: int, values: Line) -> list[str]:
        """The signs of an interval that ends with `step`, without those reported recently."""
        self._lines.append({"step": step, **values})
        if len(self._lines) > _KEPT:  # keep the first lines, for the initial losses
            del self._lines[LASTING]
        found = []
        for sign in SIGNS:
            name = sign.__name__
            if name in self._told and step - self._told[name] < self._pause:
                continue
            text = sign(self._lines, self._facts)
            if text is not None:
                self._told[name] = step
                found.append(text)
        return found
