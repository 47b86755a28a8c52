"""`launch/doctor.py lr`: a short race of learning rates on the recipe's own data, and the rate to begin with.

Every rate trains the recipe's real model from the same first values on the same batches, with the same schedule. A race
looks at the loss at its end, so it sees what a single run with a rising rate (Smith 2017) cannot: a rate that is fast
at first but ends worse.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.parallel.device import device_name, has_bf16_unit, use_device
from dsmoe_vl.parallel.process_group import HostGroup, start_process_group
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from dsmoe_vl.training.engine import build_engine
from dsmoe_vl.training.held_out import HeldOut
from dsmoe_vl.training.step import OptimizerStep

STEPS = 60
_LEAST_STEPS = 10  # two of warm-up, two that the training loss is a mean of
_PART = 5  # the warm-up is steps / _PART; so is the end whose mean is the training loss
_BELOW, _ABOVE = 3, 1  # powers of 2 below and above the JSON's rate
_FURTHER = 2  # powers of 2 by which a sweep is extended, at most, if its best rate is at its edge
_LOST = 3.0  # times the first loss: the end of a rate's race
_WIDTH = 12  # characters of a column
_SURE = 2.0  # standard errors of a difference of losses; less is noise


@dataclass(frozen=True)
class Outcome:
    """One rate's race. Losses are nats, weighted as in the recipe; `parts` are the loss of each term by held-out pack,
    or of all by step if there is no held-out data: their spread is its noise."""

    rate: float
    diverged: bool
    steps: int  # taken
    training: float = math.nan  # mean of the last steps
    held_out: float | None = None  # None: no held-out data
    terms: tuple[float, ...] = ()  # held-out loss of each term
    grad_norm: float = math.nan  # before clipping, the largest after the warm-up: before, all rates have the same
    parts: tuple[tuple[float, ...], ...] = ()

    @property
    def loss(self) -> float:
        """What rates are compared by."""
        return self.training if self.held_out is None else self.held_out


@dataclass(frozen=True)
class Choice:
    """The outcome to begin with, the best one, the noise of their difference (nan: not known), and the edge of the
    sweep at which the best one is: -1 for the lowest rate, 1 for the highest, 0 for neither."""

    chosen: Outcome
    best: Outcome
    noise: float
    edge: int


def choose(outcomes: Sequence[Outcome]) -> Choice | None:
    """The rate with the lowest loss, or the next smaller one if the difference is noise. None if all rates diverged."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.rate)
    finite = [outcome for outcome in ordered if not outcome.diverged]
    if not finite:
        return None
    at = min(range(len(finite)), key=lambda index: finite[index].loss)
    best = chosen = finite[at]
    noise = 0.0
    if at > 0:
        noise = noise_of_difference(best, finite[at - 1])
        if finite[at - 1].loss - best.loss <= noise:
            chosen = finite[at - 1]
    return Choice(chosen, best, noise, (best is ordered[-1]) - (best is ordered[0]))


def noise_of_difference(one: Outcome, other: Outcome) -> float:
    """Two standard errors of the difference of two losses, over the same held-out packs. Those of several terms are
    added, because the terms of a pack may vary together. The noise of a term in one pack alone is not known and left
    out; nan if there are no others."""
    errors = []
    for ours, theirs in zip(one.parts, other.parts, strict=True):
        if len(ours) > 1:
            differences = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
            errors.append(float(differences.std()) / math.sqrt(len(differences)))
    return _SURE * sum(errors) if errors else math.nan


def is_lost(now: Mapping[str, float], first: Mapping[str, float]) -> bool:
    """Whether a step's loss is far above that at the start. `now`: its parts; `first`: the first value of each, because
    a step may lack targets of terms that later ones have."""
    return sum(now.values()) > _LOST * sum(first[name] for name in now)


def loss_by_pack(sums: Tensor, weights: Tensor) -> tuple[tuple[float, ...], ...]:
    """Pseudo-values of the jackknife: the loss of each term by pack, so that packs with more targets count for more.

    sums: loss sum and number of targets of every term in every pack, [packs, 2, terms]; weights: [terms]. A term has a
    value for every pack with its targets.
    """
    found = []
    for of_packs, weight in zip(sums.unbind(-1), weights.tolist(), strict=True):
        having = of_packs[of_packs[:, 1] > 0]
        total, packs = having.sum(0), len(having)
        loss = total[0] / total[1].clamp(min=1)
        without = total - having
        left_out = without[:, 0] / without[:, 1].clamp(min=1)
        found.append(tuple((weight * (packs * loss - (packs - 1) * left_out)).tolist()))
    return tuple(found)


class Race:
    """Trains one recipe at many rates, in this process."""

    def __init__(self, recipe: Recipe, deepspeed: dict[str, Any], steps: int) -> None:
        """Starts the process group and reads the held-out packs. Raises ConfigError, DataError, FetchError."""
        self.ranks, self.steps = Ranks(0, 1, 0), steps
        self.recipe = replace(recipe, stages=(), run=replace(recipe.run, steps=steps))
        self.deepspeed, device = deepspeed, device_name()
        self.bf16_unit = has_bf16_unit(device)
        plan = self.plan(float(deepspeed["optimizer"]["params"]["lr"]))
        tokenizer = Tokenizer.of(recipe)
        self.tasks = build_tasks(recipe, tokenizer)
        self.device = use_device(device, self.ranks)
        start_process_group(self.ranks, device)
        self.host = HostGroup()
        encode = Encoder(build_tasks(recipe, tokenizer, training=False))
        self.held_out = HeldOut(plan, self.ranks, encode, self.host)
        self.has_held_out = any(self.held_out.batches.values())
        self.weights = torch.tensor([self.held_out.weights[term] for term in self.held_out.terms]).double()

    def plan(self, rate: float) -> RunPlan:
        """The JSON's plan with this peak rate and the race's schedule. Raises ConfigError."""
        params = {"warmup_type": "linear", "warmup_num_steps": max(self.steps // _PART, 1), "cos_min_ratio": 0.1}
        optimizer = self.deepspeed["optimizer"]
        config = {
            **self.deepspeed,
            "optimizer": {**optimizer, "params": {**optimizer["params"], "lr": rate}},
            "scheduler": {"type": "WarmupCosineLR", "params": {**params, "warmup_min_ratio": 0.01}},
        }
        return resolve(self.recipe, config, 1, device=device_name(), bf16_unit=self.bf16_unit)

    def run(self, rate: float) -> Outcome:
        """Train at one rate and measure it. The engine's memory is free again afterwards."""
        plan = self.plan(rate)
        engine = build_engine(plan, self.ranks, self.tasks)
        try:
            return self._train(plan, engine, rate)
        finally:
            engine.destroy()
            del engine
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _train(self, plan: RunPlan, engine: Any, rate: float) -> Outcome:
        take_step = OptimizerStep(plan, self.ranks, engine, self.host, self.device)
        losses: list[float] = []
        norms: list[float] = []
        first: dict[str, float] = {}  # each term of the loss when it first had targets
        with closing(self.loader(plan)) as loader:
            for batches in islice(loader, self.steps):
                shared = take_step.share(batches)
                result = take_step(shared.batches, shared.counts)
                losses.append(float(result.terms["loss"]))
                norms.append(result.grad_norm)
                now = self._weighted_terms(result.terms, shared.counts)
                first = now | first
                if result.skipped is not None or is_lost(now, first):
                    return Outcome(rate, True, len(losses), losses[-1], grad_norm=max(norms))
        largest = max(norms[self.steps // _PART :])
        end = tuple(losses[-(self.steps // _PART) :])
        training = sum(end) / len(end)
        if not self.has_held_out:
            return Outcome(rate, False, self.steps, training, grad_norm=largest, parts=(end,))
        sums = torch.cat(list(self.held_out.sums(engine, self.device).values())).cpu()
        total = sums.sum(0)
        terms = total[0] / total[1].clamp(min=1)
        loss = float(terms @ self.weights)
        of_terms, parts = tuple(terms.tolist()), loss_by_pack(sums, self.weights)
        return Outcome(rate, not math.isfinite(loss), self.steps, training, loss, of_terms, largest, parts)

    def _weighted_terms(self, terms: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, float]:
        """The parts of a step's loss: the terms of the tasks that have targets, and the balancing terms together."""
        found = {
            name: self.held_out.weights[name] * float(terms[f"loss_{name}"])
            for name in self.held_out.terms
            if counts[name]
        }
        return {**found, "balancing": float(terms["loss"]) - sum(found.values())}

    def loader(self, plan: RunPlan) -> Loader:
        """The run's first batches, read again for every rate: all of them may not fit into memory."""
        recipe, vision = plan.recipe, plan.recipe.model.vision
        return Loader(
            recipe.data, recipe.data.sources, Encoder(self.tasks), vision.patch_size,
            vision.merge, recipe.run.seed, rank=0, ranks=1, micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
        )  # fmt: skip


def sweep(rates: Sequence[float], race: Callable[[float], Outcome], extend: bool) -> list[Outcome]:
    """The outcomes of all rates. `extend`: also go on beyond an edge, as long as the best rate is there."""
    outcomes = [race(rate) for rate in rates]
    for _ in range(_FURTHER if extend else 0):
        choice = choose(outcomes)
        if choice is not None and choice.edge == 0:
            break
        known = [outcome.rate for outcome in outcomes]
        if choice is not None and choice.edge > 0:
            further, found = max(known) * 2, "the highest rate is the best so far"
        else:
            further, found = min(known) / 2, "the lowest rate is the best so far" if choice else "every rate diverged"
        print(f"{found}: the race goes on with {further:.3g}", flush=True)
        outcomes.append(race(further))
    return outcomes


def of_world(deepspeed: dict[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The JSON for one rank with the batch that `world_size` ranks have together, by accumulation.

    Raises ConfigError.
    """
    plan = resolve(recipe, deepspeed, world_size, device="cpu", bf16_unit=False)
    batch = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation * world_size,
    }
    return {**{key: value for key, value in deepspeed.items() if key != "train_batch_size"}, **batch}


def advice(choice: Choice, steps: int, whole: int) -> list[str]:
    """What to do after a race of `steps`, for a run of `whole` steps."""
    chosen, best = choice.chosen, choice.best
    lines = [f"suggested: optimizer.params.lr = {chosen.rate:.3g} in the DeepSpeed JSON"]
    if chosen is not best:
        lines.append(
            f"  {best.rate:.3g} is better by {chosen.loss - best.loss:.4f}, but up to {choice.noise:.4f} is noise (two "
            "standard errors of the difference): the smaller rate is safer"
        )
    elif math.isnan(choice.noise):
        lines.append(
            "  the noise is not known, as no term is in two held-out packs: raise run.evaluate_packs, or hold out more"
        )
    if choice.edge:
        end, other = ("lowest", "lower") if choice.edge < 0 else ("highest", "higher")
        lines.append(f"  {best.rate:.3g} is the {end} rate of the race, so a {other} one may be better: try --rates")
    lines.append(
        f"  A start, no more: this was a race of {steps} steps, and the recipe trains {whole}. The best rate falls as "
        "training gets longer (Bjorck et al. 2025, arXiv 2409.19913); a warm-up shorter than the run's can make a "
        "high rate look worse than it is. Another run.seed may exchange neighbours"
    )
    return lines


def _no_rate(outcomes: Sequence[Outcome]) -> list[str]:
    lowest = min(outcome.rate for outcome in outcomes)
    lower = ",".join(f"{lowest / factor:.2g}" for factor in (1000, 100, 10))
    return [
        f"every rate diverged, so none is suggested: try --rates {lower}, and gradient_clipping = 1.0 in the DeepSpeed "
        "JSON. If these diverge too, `launch/doctor.py objective` and `python -m data_tools.inspect` look for faults"
    ]


def _row(outcome: Outcome, columns: int, is_now: bool) -> str:
    """One line of the table; `columns`: how many a held-out loss has."""
    held_out = [] if outcome.held_out is None else [outcome.held_out, *outcome.terms]
    shown = [f"{value:.4f}" for value in held_out] or ["-"] * columns
    cells = [f"{outcome.rate:.3g}", f"{outcome.training:.4g}", *shown, f"{outcome.grad_norm:.3g}"]
    notes = ["the JSON's"] * is_now + [f"diverged at step {outcome.steps}"] * outcome.diverged
    return "".join(f"{cell:>{_WIDTH}}" for cell in cells) + "   " * bool(notes) + ", ".join(notes)


def find_rate(
    recipe_file: Path, deepspeed_file: Path, overrides: Sequence[str], rates: Sequence[float], steps: int,
    world_size: int,
) -> int:  # fmt: skip
    """Race and print. `rates`: empty for a sweep around the JSON's. Returns 1 if every rate diverged. Raises
    DsmoeVlError."""
    if steps < _LEAST_STEPS:
        raise ConfigError(f"--steps {steps}: a race needs at least {_LEAST_STEPS}, such as the default of {STEPS}")
    if len(set(rates)) == 1:
        raise ConfigError(f"--rates {rates[0]:g}: a race needs at least two, such as --rates 3e-4,6e-4,1.2e-3")
    wrong = [rate for rate in rates if not 0 < rate < math.inf]
    if wrong:
        raise ConfigError(f"--rates {wrong[0]}: a learning rate is a number above 0, such as 3e-4")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    recipe, deepspeed = load_recipe(recipe_file, overrides), load_deepspeed(deepspeed_file)
    now = float(deepspeed["optimizer"]["params"]["lr"])
    race = Race(recipe, of_world(deepspeed, recipe, world_size), steps)
    packs = race.plan(now).packs_per_step
    print(f"steps at each rate: {steps}, each with {packs} packs, the batch of --world-size {world_size}")
    if recipe.stages:
        print("the recipe's stages are left out: all steps train what its [train] says")
    print(f"warm-up of {steps // _PART} steps, then a cosine to a tenth; the same first values and batches for all")
    if not race.has_held_out:
        print(
            "there are no held-out packs (data.evaluation): rates are compared by the training loss of the last steps"
        )
    names = ["held-out", *race.held_out.terms] if race.has_held_out else []
    print("".join(f"{name:>{_WIDTH}}" for name in ["rate", "training", *names, "grad norm"]), flush=True)

    def measured(rate: float) -> Outcome:
        outcome = race.run(rate)
        print(_row(outcome, len(names), rate == now), flush=True)
        return outcome

    tried = sorted(set(rates)) or [now * 2.0**power for power in range(-_BELOW, _ABOVE + 1)]
    outcomes = sweep(tried, measured, extend=not rates)
    choice = choose(outcomes)
    for line in _no_rate(outcomes) if choice is None else advice(choice, steps, recipe.run.steps):
        print(line)
    return 1 if choice is None else 0
