"""What trains, and how: the recipe's [train] tables applied to every parameter of its model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dsmoe_vl.config.bounds import shown_key
from dsmoe_vl.config.parts import PARTS, is_adapted, is_adapter, is_matrix, part_of
from dsmoe_vl.config.recipe import PartConfig, Recipe
from dsmoe_vl.config.suggest import did_you_mean
from dsmoe_vl.config.task_table import ALIGNMENT
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.parameters import tensors


@dataclass(frozen=True)
class Rule:
    """How one parameter trains. `weight_decay`: None is the DeepSpeed JSON's; only matrices are decayed."""

    freeze: bool = False
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def then(self, part: PartConfig) -> Rule:
        """With the keys that a later table has."""
        return Rule(
            self.freeze if part.freeze is None else part.freeze,
            self.lr_scale if part.lr_scale is None else part.lr_scale,
            self.weight_decay if part.weight_decay is None else part.weight_decay,
        )


@dataclass(frozen=True)
class Trained:
    """Numbers of parameters by part of the model, of the parts that it has."""

    trained: dict[str, int]
    frozen: dict[str, int]

    @property
    def total(self) -> int:
        """All that train."""
        return sum(self.trained.values())

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of which something trains."""
        return tuple(part for part in PARTS if self.trained.get(part))


def matches(key: str, name: str) -> bool:
    """Whether the table [train.KEY] is about a parameter."""
    return part_of(name) == key if key in PARTS else fnmatchcase(name, key)


def _tables(recipe: Recipe, stage: int = 0) -> list[tuple[str, str, PartConfig]]:
    """What a message calls each table, its key and the table: the recipe's, then those of its only stage."""
    found = [(f"train.{shown_key(key)}", key, part) for key, part in recipe.train.items()]
    if len(recipe.stages) == 1:
        found += [
            (f"stages[{stage}].train.{shown_key(key)}", key, part) for key, part in recipe.stages[0].train.items()
        ]
    return found


def rules(recipe: Recipe) -> dict[str, Rule]:
    """The rule of every parameter, by its name in the one-process model; of several stages, without theirs. Before all
    tables, the parts that have adapters are frozen but for these; after them, what aligns is."""
    adapted = recipe.lora.adapted
    found = {name: Rule(freeze=part_of(name) in adapted and not is_adapter(name)) for name in tensors(recipe)}
    for _, key, part in _tables(recipe):
        found |= {name: rule.then(part) for name, rule in found.items() if matches(key, name)}
    return found | {name: Rule(freeze=True) for name in found if ALIGNMENT in name}


def count_trained(recipe: Recipe) -> Trained:
    """How much of every part trains."""
    trained, frozen = (dict.fromkeys(_parts(recipe), 0) for _ in range(2))
    shapes = tensors(recipe)
    for name, rule in rules(recipe).items():
        (frozen if rule.freeze else trained)[part_of(name)] += math.prod(shapes[name])
    return Trained(trained, frozen)


def changed_parts(recipe: Recipe, had_moments: Collection[str]) -> str:
    """What is said if other parameters train than in a checkpoint that has moments of these; empty if the same do."""
    found = rules(recipe)
    fresh = _listed(name for name, rule in found.items() if not rule.freeze and name not in had_moments)
    still = _listed(name for name, rule in found.items() if rule.freeze and name in had_moments)
    texts = [f"{fresh} train, with fresh moments" if fresh else "", f"{still} are frozen" if still else ""]
    return "; ".join(filter(None, texts))


def _listed(names: Iterable[str]) -> str:
    """By part: "2 tensors of vision"."""
    counts = Counter(map(part_of, names))
    return ", ".join(f"{counts[part]} tensor{'s' * (counts[part] > 1)} of {part}" for part in PARTS if counts[part])


def check_lora(recipe: Recipe, file: str) -> None:
    """Raises ConfigError for a part without a matrix to adapt, and for a rank above a side of one."""
    lora = recipe.lora
    for part in lora.adapted:
        sides = {name: min(shape[-2:]) for name, shape in tensors(recipe).items() if is_adapted(name, (part,))}
        if not sides:
            raise ConfigError(
                f'lora.parts in {file} names "{part}", but nothing of it in this model can have adapters: leave it out'
            )
        name = min(sides, key=lambda name: sides[name])
        if lora.rank > sides[name]:
            raise ConfigError(
                f"lora.rank = {lora.rank} in {file} is above {sides[name]}, the rank that {name} has at most: set "
                f'lora.rank to {sides[name]} or less, or leave "{part}" out of lora.parts'
            )


def check_train(recipe: Recipe, file: str, stage: int = 0) -> None:
    """Raises ConfigError for a table that is about nothing or has no effect, and for a model that does not train.
    `stage`: the index of the only one that the recipe has."""
    shapes, found = tensors(recipe), rules(recipe)
    parts = ", ".join(_parts(recipe))
    lora = " ([lora] freezes what it adapts)" if recipe.lora.rank else ""
    for shown, key, part in _tables(recipe, stage):
        names = [name for name in shapes if matches(key, name)]
        if not names:
            near = did_you_mean(key, [*_parts(recipe), *shapes])
            hint = f"{near} " if near.startswith("Did") else ""
            if key in PARTS:
                hint = "Leave it out; on the command line, train={...} replaces all of [train]. "
            raise ConfigError(
                f"{shown} in {file} is about no parameter of this model. {hint}Its parts are {parts}; a pattern is "
                f"compared with names such as {next(iter(shapes))}"
            )
        if recipe.stages and shown.startswith("train."):  # it may count in another stage
            continue
        moving = [name for name in names if not found[name].freeze]
        for setting, value in (("lr_scale", part.lr_scale), ("weight_decay", part.weight_decay)):
            if value is not None and not moving:
                raise ConfigError(
                    f"{shown}.{setting} = {value} in {file} has no effect, because all of it is frozen: remove it, or "
                    f"freeze less{lora}. The parts are {parts}"
                )
        if part.weight_decay is not None and not any(is_matrix(name, shapes[name]) for name in moving):
            raise ConfigError(
                f"{shown}.weight_decay = {part.weight_decay} in {file} has no effect: it is about norms and biases, "
                "which are not decayed. Remove it"
            )
    if all(rule.freeze for rule in found.values()):
        raise ConfigError(f"train in {file} freezes every parameter: let something train, of {parts}")


def _parts(recipe: Recipe) -> list[str]:
    """The parts that a recipe's model has."""
    has = {part_of(name) for name in tensors(recipe)}
    return [part for part in PARTS if part in has]
