"""`launch/doctor.py weights`: how strongly each task pulls at the shared parameters, and the weights that even it out.

The recipe's real model trains for some steps, because first gradients say little. Then every task's gradient is taken
apart from the others', at the same weights and batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.parts import part_of
from dsmoe_vl.config.recipe import Recipe, learned_tasks, term_weights
from dsmoe_vl.config.task_table import TaskSpec
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.doctor.learning_rate import STEPS, Race, of_world
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.training.engine import build_engine
from dsmoe_vl.training.step import OptimizerStep

MEASURED = 8  # steps whose gradients are measured
_AGAINST = -0.1  # a cosine below: two tasks undo each other's work
_OWN_PARTS = ("heads",)  # of one task alone


@dataclass(frozen=True)
class TaskGradients:
    """Of J tasks, means over the measured steps with targets of the task, or of both tasks: loss and gradient norm of
    each, 0 if there are none, and cosines [J][J] of any two. Losses and gradients have the recipe's weights; gradients
    are of the parameters that the tasks share."""

    tasks: tuple[str, ...]
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(tasks: Sequence[str], losses: Tensor, products: Tensor) -> TaskGradients:
        """losses [steps, J]; products [steps, J, J], of the gradients of a step with each other."""
        norms = products.diagonal(dim1=1, dim2=2).sqrt()
        there = (norms > 0).double()
        steps, both = there.sum(0).clamp(min=1), there.unsqueeze(1) * there.unsqueeze(2)
        sizes = norms.unsqueeze(1) * norms.unsqueeze(2)
        cosines = (products / sizes.clamp(min=1e-30) * both).sum(0) / both.sum(0).clamp(min=1)

        def mean(values: Tensor) -> tuple[float, ...]:
            return tuple(((values * there).sum(0) / steps).tolist())

        return TaskGradients(tuple(tasks), mean(losses), mean(norms), tuple(map(tuple, cosines.tolist())))

    def factors(self) -> tuple[float, ...]:
        """What to multiply each task's weights by, so that all gradients are as long as their geometric mean; 1 for a
        task without a gradient."""
        logs = [math.log(norm) for norm in self.norms if norm > 0]
        even = math.exp(sum(logs) / len(logs)) if logs else 1.0
        return tuple(even / norm if norm > 0 else 1.0 for norm in self.norms)


def measure(race: Race, plan: RunPlan, steps: int) -> TaskGradients:
    """Train, and measure in the next steps."""
    engine = build_engine(plan, race.ranks, race.tasks)
    take_step = OptimizerStep(plan, race.ranks, engine, race.host, race.device)
    learned = learned_tasks(plan.recipe)
    weights = term_weights(plan.recipe)
    losses, products = [], []
    with closing(race.loader(plan)) as loader:
        for number, batches in enumerate(islice(loader, steps + MEASURED)):
            shared = take_step.share(batches)
            if number < steps:
                take_step(shared.batches, shared.counts)
                continue
            found = _gradients(engine.module, learned, weights, shared.batches, shared.counts, race.device)
            losses.append(found[0])
            products.append(found[1])
    engine.destroy()
    return TaskGradients.of([task.name for task in learned], torch.stack(losses), torch.stack(products))


def _gradients(
    model: torch.nn.Module,
    tasks: Sequence[TaskSpec],
    weights: dict[str, float],
    batches: list[Batch],
    counts: dict[str, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Losses [J] and products [J, J] of one step, float64 on the host."""
    shared = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and part_of(name) not in _OWN_PARTS
    ]
    losses = torch.zeros(len(tasks), dtype=torch.float64)
    sums = [[torch.zeros_like(parameter) for parameter in shared] for _ in tasks]
    for batch in batches:
        output, _ = model(batch.to(device))
        for index, task in enumerate(tasks):
            shares = [
                weights[term.name] * output.loss_sums[term.name] / max(counts[term.name], 1) for term in task.terms
            ]
            loss = torch.stack(shares).sum()
            losses[index] += float(loss.detach())
            last = index == len(tasks) - 1
            for total, gradient in zip(
                sums[index], torch.autograd.grad(loss, shared, retain_graph=not last, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    total += gradient
    products = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for i, ours in enumerate(sums):
        for j, theirs in enumerate(sums[: i + 1]):
            product = sum(float((a.double() * b.double()).sum()) for a, b in zip(ours, theirs, strict=True))
            products[i, j] = products[j, i] = product
    return losses, products


def advice(found: TaskGradients, recipe: Recipe) -> list[str]:
    """The weights to try, and which tasks are against each other."""
    lines = []
    for spec, factor in zip(learned_tasks(recipe), found.factors(), strict=True):
        settings = getattr(recipe.tasks, spec.name)
        for term in spec.terms:
            if weight := getattr(settings, term.weight):
                lines.append(f"  tasks.{spec.name}.{term.weight} = {weight * factor:.3g}" + f"   # now {weight:g}")
    lines.insert(0, "suggested, so that every task pulls equally:")
    for i, one in enumerate(found.tasks):
        for j, other in enumerate(found.tasks[:i]):
            if found.cosines[i][j] < _AGAINST:
                lines.append(
                    f"{other} and {one} are against each other (cosine {found.cosines[i][j]:.2f}): more experts, or "
                    'moe.routing = "task", give each of them parameters of its own'
                )
    lines.append(
        "A start, no more: equal gradients are not equal scores, and they change as training goes on;\n"
        "objective.task_weights.method learns factors while it trains"
    )
    return lines


def find_weights(recipe_file: Path, deepspeed_file: Path, overrides: Sequence[str], steps: int, world_size: int) -> int:
    """Measure and print. Returns 0. Raises DsmoeVlError."""
    recipe, deepspeed = load_recipe(recipe_file, overrides), load_deepspeed(deepspeed_file)
    names = [task.name for task in learned_tasks(recipe)]
    if len(names) < 2:
        raise ConfigError(f"{recipe_file} learns {', '.join(names) or 'nothing'}: weights are of at least two tasks")
    if steps < 0:
        raise ConfigError(f"--steps {steps}: give 0 or more, such as the default of {STEPS}")
    # Gradients are read where they are made: in fp32, each parameter whole.
    plain: dict[str, Any] = {**deepspeed, "zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}
    race = Race(recipe, of_world(plain, recipe, world_size), max(steps, 1))
    plan = race.plan(float(deepspeed["optimizer"]["params"]["lr"]))
    packs = f"{plan.packs_per_step} pack{'s' * (plan.packs_per_step > 1)}"
    print(f"{steps} steps of {packs}, then the gradients of {MEASURED} more, in fp32", flush=True)
    if recipe.tasks.retrieval.gradient_cache:
        print("retrieval contrasts the pairs of one micro-step here, without the gradient cache")
    found = measure(race, plan, steps)
    print("".join(f"{name:>12}" for name in ("task", "loss", "gradient")) + "   cosine with " + ", ".join(names))
    for name, loss, norm, cosines in zip(names, found.losses, found.norms, found.cosines, strict=True):
        print(f"{name:>12}{loss:12.4f}{norm:12.4f}   " + "".join(f"{cosine:8.2f}" for cosine in cosines))
    for line in advice(found, recipe):
        print(line)
    return 0
