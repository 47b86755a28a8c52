"""One optimizer step: counts over all ranks, forward, objective and backward of every micro-step, the engine's update.

Shapes: N MoE layers, J tasks, M modalities, E experts, G groups of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_vl.config.parts import PARTS
from dsmoe_vl.config.recipe import learned_tasks
from dsmoe_vl.config.task_table import task_rows
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.segment import COUNTS
from dsmoe_vl.moe.router import Router
from dsmoe_vl.moe.stats import RouterStats, RoutingSums, max_violation
from dsmoe_vl.objective.objective import Objective, load_fractions, uniform_load
from dsmoe_vl.optim.gradients import local_squares
from dsmoe_vl.optim.overflow import measure_gradient
from dsmoe_vl.optim.parameter_groups import rate_of
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.training.clock import PhaseClock
from dsmoe_vl.training.gradient_cache import CachedGradients, cache_gradients, with_cached_gradients
from dsmoe_vl.training.skipped import Skipped


class Shared(NamedTuple):
    """What the ranks agree on before a step: this rank's batches with `pairs_of_ranks`, the counts of all ranks
    (including "patches"), whether any rank wants to stop, and whether any still writes its part of a checkpoint. Read
    by name, so that it can get another field."""

    batches: list[Batch]
    counts: dict[str, int]
    stopping: bool
    writing: bool = False


@dataclass(frozen=True)
class StepResult:
    """Results of a step over all ranks: loss terms (scalars), routing (None without MoE layers), counts, the learning
    rate and gradient norm of the update, and, if requested, the norm by part of the model that trains. `skipped`: why
    nothing was updated, None otherwise.
    """

    terms: dict[str, Tensor]
    routing: RoutingSums | None
    counts: dict[str, int]
    learning_rate: float
    grad_norm: float
    part_norms: dict[str, Tensor] = field(default_factory=dict)
    skipped: Skipped | None = None


class OptimizerStep:
    """Takes optimizer steps with an engine; keeps load fractions, the balancing bias and the weights of tasks for the
    next step."""

    def __init__(self, plan: RunPlan, ranks: Ranks, engine: Any, host: HostGroup, device: torch.device) -> None:
        self.plan, self.ranks, self.engine, self.host, self.device = plan, ranks, engine, host, device
        self.objective = Objective(plan, device)
        self.moe = plan.recipe.moe
        learned = learned_tasks(plan.recipe)
        self.contrasts = any(term.targets == "pairs" for task in learned for term in task.terms)
        model = plan.recipe.model
        of_balancing = {"all": 1, "task": task_rows(model.hears), "modality": model.modalities}
        experts, groups = experts_of_layers(plan.recipe), of_balancing[self.moe.balance_over]
        self.even_load = uniform_load(experts, groups, device) if experts else None
        self.experts = torch.tensor(experts, device=device)
        self.load_fraction = self.even_load
        self.clock = PhaseClock(device)
        self.before_update: Callable[[], None] | None = None  # called when all gradients of a step are accumulated
        self._has_skipped = False  # the last step
        self.routers = [module for module in engine.module.modules() if isinstance(module, Router)]

    def state_dict(self) -> dict[str, Any]:
        """What the next step has from those before, beside the model's and the optimizer's state; for JSON."""
        fractions = None if self.load_fraction is None else self.load_fraction.tolist()
        return {"load_fraction": fractions, "task_weights": self.objective.task_weights.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that of a checkpoint; None: it has none."""
        if state["load_fraction"] is not None:
            self.load_fraction = torch.tensor(state["load_fraction"], device=self.device)
        if state["task_weights"] is not None:
            self.objective.task_weights.load_state_dict(state["task_weights"])

    def share(self, batches: list[Batch], stop: bool = False, writing: bool = False) -> Shared:
        """What the step needs to know of the other ranks. `stop`: this one wants to stop; `writing`: it still writes
        its part of a checkpoint. One small all-reduce on the host. Collective."""
        self.clock.entered("exchange of counts")
        names = (*COUNTS, "patches")
        totals = [sum(batch.counts[name] for batch in batches) for name in COUNTS]
        totals.append(sum(len(batch.patches) for batch in batches))
        world, rank = self.ranks.world_size, self.ranks.rank
        pairs = [0] * (world * len(batches)) if self.contrasts else []  # micro-step by micro-step, then rank by rank
        if self.contrasts:
            pairs[rank::world] = [len(batch.pair_ids) for batch in batches]
        stops, writers, *summed = self.host.sum([int(stop), int(writing), *totals, *pairs])
        if self.contrasts:
            of_ranks = summed[len(names) :]
            batches = [
                replace(batch, pairs_of_ranks=tuple(of_ranks[i * world : (i + 1) * world]))
                for i, batch in enumerate(batches)
            ]
        return Shared(batches, dict(zip(names, summed[: len(names)], strict=True)), stops > 0, writers > 0)

    def __call__(self, batches: list[Batch], counts: dict[str, int], part_norms: bool = False) -> StepResult:
        """Update the model with batches and counts from `share`. `part_norms`: also compute the gradient norm by part,
        which reads every gradient once more.

        If the loss or the gradient norm of any rank is not finite, all ranks skip the update: weights, optimizer state,
        load fractions, the balancing bias and the weights of tasks stay as they are, only the learning rate's schedule
        advances. Collective.
        """
        learning_rate = rate_of(self.engine.basic_optimizer)
        part_norms = part_norms or self._has_skipped  # to name the parts from the second skipped step in a row
        terms: dict[str, Tensor] = {}
        scalars: list[Tensor] = []
        layer_stats: list[RouterStats] = []
        whose = self.engine.module, self.plan.ep_size, self.ranks.rank, self.device
        for output, stats in self._forwards([batch.to(self.device) for batch in batches]):
            loss = self.objective(output, stats, counts, self.load_fraction)
            with self.clock.phase("backward"):
                self.engine.backward(_spreading(loss.scalar))
            scalars.append(loss.scalar.detach())
            if self.engine.is_gradient_accumulation_boundary():
                if self.before_update is not None:
                    self.before_update()
                if part_norms:
                    squares = local_squares(*whose)
                if self.engine.optimizer is self.engine.basic_optimizer:  # the others check the gradient themselves
                    measure_gradient(self.engine.optimizer, *whose)
            with self.clock.phase("optimizer"):
                self.engine.step()
            for name, value in loss.terms.items():
                terms[name] = terms[name] + value if name in terms else value
            if stats is not None:
                layer_stats.append(RouterStats(*(value.detach() for value in stats)))
            del output, stats, loss  # else their graph would live on through the next forward
        self._has_skipped = not self.engine.was_step_applied()
        if self._has_skipped and self.engine.lr_scheduler is not None:
            # The engine does not, but a skipped step is a step of the run: its batches are used up, and the rate of a
            # step must not depend on how many were skipped before, else the schedule would not end with the run.
            self.engine.lr_scheduler.step()
        if part_norms:
            terms |= zip(PARTS, squares.unbind(), strict=True)
        terms, routing = self.reduce(terms, layer_stats)
        terms |= self.objective.task_weights.logged()  # those of this step
        squared = {part: terms.pop(part) for part in PARTS} if part_norms else {}
        norms = {part: squared[part].sqrt() for part in self.plan.trained.parts} if part_norms else {}
        if not self._has_skipped:
            self.objective.task_weights.update(terms, counts)
        if routing is not None and not self._has_skipped:
            self.load_fraction = load_fractions(routing.load, self.moe.balance_over, self.even_load)
            self._move_selection_bias(routing.load.sum((1, 2)))
        skipped = self._explain(terms, norms, batches, scalars) if self._has_skipped else None
        grad_norm = float(self.engine.get_global_grad_norm())
        return StepResult(terms, routing, counts, learning_rate, grad_norm, norms, skipped)

    def _explain(
        self, terms: dict[str, Tensor], norms: dict[str, Tensor], batches: list[Batch], scalars: list[Tensor]
    ) -> Skipped:
        bad = [batch.keys for batch, loss in zip(batches, scalars, strict=True) if not loss.isfinite()]
        of_ranks = self.host.gather([key for keys in bad for key in keys])
        samples = dict.fromkeys(key for keys in of_ranks for key in keys)
        return Skipped.of_step(terms, norms, tuple(samples))

    def _forwards(self, batches: list[Batch]) -> Iterator[tuple[Any, RouterStats | None]]:
        if not (self.contrasts and self.plan.recipe.tasks.retrieval.gradient_cache):
            yield from (self._forward(batch) for batch in batches)
            return
        with self.clock.phase("forward"):
            caches = cache_gradients(self.engine, batches, self.plan.recipe.tasks.retrieval.loss)
        for batch, cache in zip(batches, caches, strict=True):
            yield self._forward(batch, cache)

    def _forward(self, batch: Batch, cache: CachedGradients | None = None) -> tuple[Any, RouterStats | None]:
        with self.clock.phase("forward"):
            output, stats = self.engine(batch)
        return (output if cache is None else with_cached_gradients(output, cache)), stats

    def _move_selection_bias(self, load: Tensor) -> None:
        if not self.moe.bias_rate:
            return
        for router, of_layer in zip(self.routers, load, strict=True):
            if not any(parameter.requires_grad for parameter in router.parameters()):
                continue  # it is frozen
            router.move_selection_bias(of_layer[: len(router.selection_bias)], self.moe.bias_rate)

    def reduce(
        self, terms: dict[str, Tensor], stats: list[RouterStats]
    ) -> tuple[dict[str, Tensor], RoutingSums | None]:
        """Loss terms and routing of the whole step, over all ranks: one all-reduce. Collective."""
        self.clock.entered("sums over ranks")
        pieces = [torch.stack(list(terms.values()))]
        if stats:
            parts = self.ranks.world_size * len(stats)
            sums = [
                (s.load, s.entropy_sum, s.dropped, s.gates, max_violation(s.load.sum((1, 2)), self.experts) / parts)
                for s in stats
            ]
            pieces += [torch.stack(list(values)).sum(0) for values in zip(*sums, strict=True)]
        flat = torch.cat([piece.float().flatten() for piece in pieces])
        if self.ranks.world_size > 1:
            dist.all_reduce(flat)
        split = flat.split([piece.numel() for piece in pieces])
        values, *rest = (part.view_as(piece) for part, piece in zip(split, pieces, strict=True))
        reduced = dict(zip(terms, values.unbind(), strict=True))
        return reduced, RoutingSums(*rest) if stats else None


def _spreading(loss: Tensor) -> Tensor:
    """The loss itself; if it is not finite, its gradient is not either. So the check of the gradient's norm, on which
    the ranks agree anyway, also finds an infinite loss, without a collective or a wait for the device."""
    return loss * (1 + 0 * loss.detach())
