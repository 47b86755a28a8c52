"""Signs of trouble in the logged values, each with its likely cause and the setting to try.

Every sign is a pure function of the lines logged so far (values by name; evaluations, then intervals, the newest last)
that returns a sentence or None. Most signs need several lines in a row, so that one bad interval gives no warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.planner.parameters import experts_of_layers

LASTING = 5  # lines that a state must last
_DEAD = 0.25  # fraction of dead experts
_VIOLATION = 0.8  # fraction of the value that one expert with all tokens gives
_ENTROPY = 0.05  # fraction of even routing's entropy
_WAIT = 0.2  # fraction of the step time
_STILL_LINES, _STILL_STEPS, _STILL_FALL = 20, 200, 0.01  # lines and steps in which a loss must fall by this fraction
_EXPLODING = 10.0  # times the median
_WORSE = 0.1  # fraction by which a loss must be above another one to be worse for sure
_BETTER = 0.05  # fraction by which a loss must be below another one to have fallen
_WINDOW = 20  # lines of a task's best time, and half of those that it is compared with
_CHANCE = 0.97  # of the value of guesses; tasks that learn are far below
_KEPT = 400  # lines kept, of intervals and of evaluations each

Line = dict[str, float]


@dataclass(frozen=True)
class Facts:
    """Facts of a run that the signs need. `from_start`: its lines begin with its first step."""

    experts: int  # of the widest layer; 0: dense
    top_k: int
    task_routing: bool  # the recipe sends all tokens of a task to the same experts
    from_start: bool
    contrast: str = "info_nce"  # tasks.retrieval.loss
    steps: int = 0  # optimizer steps of the whole run


def non_finite(lines: Sequence[Line], facts: Facts) -> str | None:
    """A loss or a gradient norm that is not finite, or steps that were skipped because of one."""
    last = lines[-1]
    names = [name for name in last if name.startswith(("loss", "grad_norm", "z_loss", "balance_loss"))]
    wrong = [name for name in names if not math.isfinite(last[name])]
    skipped = last.get("skipped_steps", 0)
    if not (wrong or skipped):
        return None
    what = f"{', '.join(wrong)} not finite" if wrong else f"steps skipped since the last line: {skipped:.0f}"
    return (
        f"{what}. Such steps do not change the weights. Likely a learning rate that is too high, or one bad sample. If "
        "it lasts, continue from the last checkpoint with a lower optimizer.params.lr, a longer warmup_num_steps and "
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
    still = []
    for name in _terms(lines):
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


def overfitting(lines: Sequence[Line], facts: Facts) -> str | None:
    """A held-out loss that lasts above its best, or above its value before training, while the training loss falls."""
    evaluations = [line for line in lines if "eval_loss" in line]
    worse = []
    for name in ("loss", *_terms(lines)):
        held_out = [(line["step"], line[f"eval_{name}"]) for line in evaluations if f"eval_{name}" in line]
        before, recent = held_out[:-LASTING], held_out[-LASTING:]
        if not before or not all(math.isfinite(loss) for _, loss in held_out):
            continue
        step, best = min(before, key=lambda found: found[1])
        untrained = before[0][1] if before[0][0] == 0 else math.inf
        if min(loss for _, loss in recent) <= min(best * (1 + _WORSE), untrained):
            continue
        trained = [line[name] for line in lines if name in line and line["step"] > step]
        if len(trained) >= 2 * LASTING and _has_fallen(trained[:LASTING], trained[-LASTING:]):
            worse.append(f"{name} (held out {best:.3f} at step {step:.0f}, {recent[-1][1]:.3f} now)")
    if not worse:
        return None
    return (
        f"overfitting: {', '.join(worse)} gets worse on held-out data and better on training data. Likely too little "
        "data for this model and this many steps. Try data.augment, more data, fewer run.steps, a smaller model, or a "
        "larger weight_decay in optimizer.params of the DeepSpeed JSON"
    )


def stalled_task(lines: Sequence[Line], facts: Facts) -> str | None:
    """A task that still guesses, or that was learned and is lost while others learn."""
    stalled = [*_guessing(lines, facts), *_lost(lines)]
    if not stalled:
        return None
    return (
        f"{', '.join(stalled)}. Likely a task weight that is too low beside the others, few samples of the task in the "
        "mixture, captions that do not distinguish the samples, or too few pairs in a micro-step. Try a larger weight "
        "in [tasks.NAME], a larger weight of its sources, a lower optimizer.params.lr, or for retrieval a larger "
        "train_micro_batch_size_per_gpu or tasks.retrieval.gradient_cache = true"
    )


def _guessing(lines: Sequence[Line], facts: Facts) -> list[str]:
    """Terms whose loss is that of guesses after a quarter of the run. Only of terms for which that value is known."""
    recent = [line for line in lines if "loss" in line][-_STILL_LINES:]
    if len(recent) < _STILL_LINES or recent[-1]["step"] < max(_STILL_STEPS, facts.steps / 4):
        return []
    found = []
    for name in ("loss_retrieval", "loss_ranking"):
        ratios = [line[name] / chance for line in recent if name in line and (chance := _chance(name, line, facts))]
        if len(ratios) == _STILL_LINES and median(ratios) >= _CHANCE and min(ratios[-LASTING:]) >= _CHANCE:
            found.append(f"{name} ({recent[-1][name]:.3f}) is that of guesses")
    return found


def _chance(name: str, line: Line, facts: Facts) -> float:
    """The smallest loss without any knowledge; 0: unknown."""
    if name == "loss_ranking":
        return math.log(2)  # frames with equal scores
    pairs = line.get("pairs", 0.0)
    if pairs < 2:
        return 0.0
    if facts.contrast == "info_nce":
        return math.log(pairs)  # a little more if micro-steps have different numbers of pairs
    return math.log(pairs) - (pairs - 1) * math.log1p(-1 / pairs)  # every pair with probability 1 / pairs


def _lost(lines: Sequence[Line]) -> list[str]:
    """Terms that have fallen and are now worse than at their best, beyond their noise, while another one falls."""
    found = []
    for name in _terms(lines):
        having = [line for line in lines if name in line and math.isfinite(line[name])]
        values = [line[name] for line in having]
        starts = range(0, len(values) - 3 * _WINDOW + 1, LASTING)
        if not starts:
            continue
        at = min(reversed(starts), key=lambda start: median(values[start : start + _WINDOW]))
        best, now = values[at : at + _WINDOW], values[-2 * _WINDOW :]
        is_worse = median(now) > (1 + _WORSE) * median(best) and quantiles(now, n=10)[0] > quantiles(best, n=10)[8]
        if is_worse and _has_fallen(values[:LASTING], best) and _another_falls(name, having, at):
            found.append(f"{name} has risen from {median(best):.3f} to {median(now):.3f} while another task learns")
    return found


def _another_falls(name: str, lines: Sequence[Line], at: int) -> bool:
    """Whether another term has fallen between the window at `at` and now."""
    for other in _terms(lines):
        then, now = (
            [line[other] for line in part if other in line]
            for part in (lines[at : at + _WINDOW], lines[-2 * _WINDOW :])
        )
        if other != name and then and now and _has_fallen(then, now):
            return True
    return False


def high_rate(lines: Sequence[Line], facts: Facts) -> str | None:
    """A loss at the peak of the learning rate that is above what it was at a lower rate in the warm-up.

    A rate that is too high by less is not visible in one run: the quickstart at 8 and at 32 times its rate only learns
    more slowly. A grad_norm far above gradient_clipping is no sign either, because Adam divides the scale out: for a
    tiny model with three tasks its median was 6.3 at a rate that is too low, and 2.3 at 8 times that rate.
    """
    trained = [line for line in lines if "loss" in line and "lr" in line]
    recent = trained[-2 * LASTING :]
    rate = min((line["lr"] for line in recent), default=0.0)
    lower = [line for line in trained[: -2 * LASTING] if line["lr"] < rate]
    losses = [line["loss"] for line in recent]
    if len(lower) < LASTING or not all(map(math.isfinite, losses)):
        return None
    windows = [lower[start : start + LASTING] for start in range(len(lower) - LASTING + 1)]
    best = min(windows, key=lambda window: median(line["loss"] for line in window))
    early = [line["loss"] for line in best]
    if median(losses) <= (1 + _WORSE) * median(early) or min(losses) <= max(early):
        return None
    return (
        f"the loss rises with the learning rate: {median(early):.3f} at {best[-1]['lr']:.3g}, {median(losses):.3f} at "
        f"{recent[-1]['lr']:.3g}. Likely a rate that is too high. Try half of optimizer.params.lr in the DeepSpeed "
        "JSON; `launch/doctor.py lr` compares rates on your data"
    )


def _terms(lines: Sequence[Line]) -> list[str]:
    """Names of the tasks' loss terms."""
    return sorted({name for line in lines for name in line if name.startswith("loss_")})


def _has_fallen(early: Sequence[float], late: Sequence[float]) -> bool:
    return median(late) < (1 - _BETTER) * median(early)


SIGNS: tuple[Callable[[Sequence[Line], Facts], str | None], ...] = (
    non_finite,
    exploding_gradient,
    collapsing_router,
    starving_loader,
    still_loss,
    overfitting,
    stalled_task,
    high_rate,
)


class Watch:
    """Checks every line for signs, and reports each one at most once in `_pause` steps."""

    def __init__(self, recipe: Recipe, first_step: int) -> None:
        moe, experts = recipe.moe, experts_of_layers(recipe)
        self._facts = Facts(
            max(experts, default=0), moe.top_k, moe.routing == "task", first_step == 0,
            recipe.tasks.retrieval.loss, recipe.run.steps,
        )  # fmt: skip
        self._pause = max(100, 20 * recipe.run.log_every)
        self._intervals: list[Line] = []
        self._evaluations: list[Line] = []
        self._told: dict[str, float] = {}

    def look(self, step: int, values: Line) -> list[str]:
        """The signs of an interval or an evaluation that ends with `step`, without those reported recently."""
        lines = self._evaluations if "eval_loss" in values else self._intervals
        lines.append({"step": step, **values})
        if len(lines) > _KEPT:  # keep the first lines, for the initial losses
            del lines[LASTING]
        found = []
        for sign in SIGNS:
            name = sign.__name__
            if name in self._told and step - self._told[name] < self._pause:
                continue
            text = sign([*self._evaluations, *self._intervals], self._facts)
            if text is not None:
                self._told[name] = step
                found.append(text)
        return found
