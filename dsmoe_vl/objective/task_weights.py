"""What each task's loss is multiplied by, beyond the recipe's weights: fixed, or learned from the losses themselves.

The weights of a step follow from the global losses of the steps before. Within a step they are numbers, the same for
every rank and micro-step, so loss and gradients stay the same for any split.

Shapes: J tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.config.recipe import Recipe, learned_tasks, term_weights

_LEAST = 1e-8  # of a loss whose logarithm is taken


class TaskWeights:
    """One number a task, moved by Adam after every step: all 0 at first, when every factor is 1.

    L_i is the sum of a task's terms with their weights of the recipe, over the targets of all ranks in a step.

    - "uncertainty": the number is a log variance s_i, the factor exp(-s_i), and s_i descends on
      `exp(-s_i) L_i + s_i / 2` (Kendall et al. 2018, equation 10): it comes to rest where the weighted loss is 1/2.
    - "famo": with z the softmax of the numbers, the factors are `J (z_i / L_i) / sum_j (z_j / L_j)` of the latest
      losses, so that the logarithms of all losses fall evenly; the numbers descend on
      `sum_i z_i (log L_i before - log L_i now)` (Liu et al. 2023, algorithm 1, where both losses are of one batch). The
      mean of the factors is 1.

    A task without targets in a step keeps its latest loss.
    """

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        self.settings, self.tasks = recipe.objective.task_weights, learned_tasks(recipe)
        self._terms = term_weights(recipe)
        self._numbers = torch.zeros(len(self.tasks), dtype=torch.float64, device=device)
        self._losses = torch.ones_like(self._numbers)  # the latest of each task
        self._known = [False] * len(self.tasks)  # whether there is one
        self._adam = torch.optim.Adam([self._numbers], lr=self.settings.rate, weight_decay=self.settings.decay)
        self._of_terms: dict[str, float | Tensor] = {}
        self._weigh()

    @property
    def factors(self) -> Tensor:
        """[J], float64."""
        if self.settings.method == "uncertainty":
            return (-self._numbers).exp()
        if self.settings.method == "fixed" or not any(self._known):
            return torch.ones_like(self._numbers)
        known = self._mask(self._known)
        # A task that has had no targets yet counts as an average one.
        losses = torch.where(known, self._losses, (self._losses * known).sum() / known.sum())
        shares = self._numbers.softmax(0) / losses
        return len(shares) * shares / shares.sum()

    def of(self, term: str) -> float | Tensor:
        """The weight of one term: a number, or a scalar float32 tensor."""
        return self._of_terms[term]

    def logged(self) -> dict[str, Tensor]:
        """The factors by the names under which they are logged; nothing if they are fixed."""
        if self.settings.method == "fixed":
            return {}
        return {f"weight_{task.name}": value for task, value in zip(self.tasks, self.factors.float(), strict=True)}

    def update(self, terms: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Take the loss terms `loss_NAME` of a step and the number of their targets, both over all ranks."""
        if self.settings.method == "fixed":
            return
        present, again = [False] * len(self.tasks), [False] * len(self.tasks)
        losses = self._losses.clone()
        for index, task in enumerate(self.tasks):
            having = [term.name for term in task.terms if counts[term.name] and self._terms[term.name]]
            if having:
                loss = sum(self._terms[name] * terms[f"loss_{name}"].double() for name in having)
                losses[index] = torch.as_tensor(loss).clamp(min=_LEAST)
                present[index], again[index] = True, self._known[index]
        moved = present if self.settings.method == "uncertainty" else again
        if any(moved):
            self._numbers.grad = torch.where(self._mask(moved), self._gradient(losses, again), 0.0)
            self._adam.step()
        self._losses = losses
        self._known = [known or here for known, here in zip(self._known, present, strict=True)]
        self._weigh()

    def _gradient(self, losses: Tensor, again: list[bool]) -> Tensor:
        if self.settings.method == "uncertainty":
            return 0.5 - (-self._numbers).exp() * losses
        gain = torch.where(self._mask(again), self._losses.log() - losses.log(), 0.0)
        share = self._numbers.softmax(0)
        return share * (gain - (share * gain).sum())

    def state_dict(self) -> dict[str, Any]:
        """Numbers by task, for a checkpoint."""
        adam = self._adam.state.get(self._numbers, {})
        moments = {name: value.tolist() for name, value in adam.items()}
        names = [task.name for task in self.tasks]
        state = {"numbers": self._numbers.tolist(), "losses": self._losses.tolist(), "known": self._known}
        return {"method": self.settings.method, "tasks": names, **state, "adam": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with those of a checkpoint. With another method or other tasks the weights begin anew."""
        if state.get("method") != self.settings.method or state["tasks"] != [task.name for task in self.tasks]:
            return
        self._numbers.copy_(self._like(state["numbers"]))
        self._losses, self._known = self._like(state["losses"]), list(state["known"])
        if state["adam"]:
            moments = {name: self._like(value) for name, value in state["adam"].items() if name != "step"}
            self._adam.state[self._numbers] = {"step": torch.tensor(state["adam"]["step"]), **moments}
        self._weigh()

    def _like(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._numbers.device)

    def _mask(self, values: list[bool]) -> Tensor:
        return torch.tensor(values, device=self._numbers.device)

    def _weigh(self) -> None:
        """Make the weights of the terms for the next step."""
        factors = None if self.settings.method == "fixed" else self.factors.float()
        for index, task in enumerate(self.tasks):
            for term in task.terms:
                weight = self._terms[term.name]
                self._of_terms[term.name] = weight if factors is None else weight * factors[index]
