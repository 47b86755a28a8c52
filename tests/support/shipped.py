"""The recipes that are shipped, on a machine without the weights that some start from."""

from __future__ import annotations

from pathlib import Path

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.toml"))


def shipped(path: Path) -> Recipe:
    """A recipe of RECIPES; the shapes that imported weights would give are the defaults."""
    return load_recipe(path, ['model.init_from=""'])


def named(name: str) -> Recipe:
    """The shipped recipe of a name."""
    return shipped(next(path for path in RECIPES if path.stem == name))
