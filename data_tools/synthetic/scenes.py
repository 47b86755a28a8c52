"""The synthetic world: coloured shapes on a light background, and pictures of one or two of them with exact captions.

A scene is a pure function of its numpy Generator. Lengths are in cells of a grid, which scales with the picture.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 30, 35),
    "blue": (35, 70, 215),
    "green": (35, 150, 50),
    "yellow": (240, 210, 20),
    "purple": (135, 40, 175),
    "orange": (245, 135, 20),
    "black": (25, 25, 25),
    "cyan": (25, 190, 210),
}
CELLS = 4  # of the grid of shapes, along the longer side; with it a small model learns in minutes
SIZES = {"small": 1, "large": 2}  # cells across
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # and their inverses
TWO_OBJECTS = 0.4  # share of the scenes

Corner = tuple[int, int]  # column and row of the upper left cell
Combination = tuple[str, str, str]  # (shape, colour, and size in a picture or motion in a video)


@dataclass(frozen=True)
class Item:
    """One shape of a scene."""

    shape: str
    colour: str
    size: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


def article(noun_phrase: str) -> str:
    """`noun_phrase` after "a" or "an"."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def combinations(third: Sequence[str], held_out: bool) -> list[Combination]:
    """The combinations of a split, in a fixed order. `third`: the values of the third attribute.

    One combination of each colour is held out. Training has every value of every attribute and every coloured shape,
    but no held-out combination; every evaluation sample has one.
    """
    diagonal = [(SHAPES[i % len(SHAPES)], colour, third[i % len(third)]) for i, colour in enumerate(COLOURS)]
    if held_out:
        return diagonal
    return [combination for combination in product(SHAPES, COLOURS, third) if combination not in diagonal]


@cache
def shape_mask(shape: str, diameter: int) -> Image.Image:
    """The anti-aliased silhouette, mode "L", `diameter` x `diameter` pixels."""
    scale = 8
    side = diameter * scale
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)

    def corners(count: int, *radii: float) -> list[tuple[float, float]]:
        """`count` points around the centre, from the top on; radii alternate, as fractions of half the side."""
        return [
            (
                side / 2 * (1 + radii[i % len(radii)] * math.sin(2 * math.pi * i / count)),
                side / 2 * (1 - radii[i % len(radii)] * math.cos(2 * math.pi * i / count)),
            )
            for i in range(count)
        ]

    if shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif shape == "square":
        inset = side * 0.06
        draw.rectangle((inset, inset, side - inset, side - inset), fill=255)
    elif shape == "triangle":
        draw.polygon([(side / 2, 0), (side - 1, side * 0.92), (0, side * 0.92)], fill=255)
    elif shape == "star":
        draw.polygon(corners(10, 1.0, 0.42), fill=255)
    elif shape == "cross":
        low, high = side * 0.33, side * 0.67
        draw.rectangle((low, 0, high, side - 1), fill=255)
        draw.rectangle((0, low, side - 1, high), fill=255)
    elif shape == "ring":
        hole = side * 0.27
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        draw.ellipse((hole, hole, side - hole, side - hole), fill=0)
    else:
        raise AssertionError(f"no drawing for {shape!r}")
    return image.resize((diameter, diameter), Image.Resampling.BOX)


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A light tint with faint noise, mode "RGB"."""
    tint = rng.integers(222, 248, size=3)
    noise = rng.normal(0.0, 2.5, size=(height, width, 3))
    return Image.fromarray(np.clip(tint + noise, 0, 255).astype(np.uint8))


def paint(canvas: Image.Image, shape: str, colour: str, diameter: int, centre: tuple[float, float], cell: int) -> None:
    """Draw a shape onto `canvas`; its corner is rounded up and left to the grid of `cell` pixels.

    `centre` (x, y) and `diameter` in pixels. Parts outside the canvas are cut off.
    """
    canvas.paste(COLOURS[colour], on_grid(diameter, centre, cell), shape_mask(shape, diameter))


def on_grid(diameter: int, centre: tuple[float, float], cell: int) -> tuple[int, int]:
    """The upper left corner at which `paint` draws, in pixels."""
    left, top = (math.floor((middle - diameter / 2) / cell) * cell for middle in centre)
    return left, top


def scene(rng: np.random.Generator, held_out: bool, size: int, max_objects: int) -> tuple[bytes, dict[str, Any]]:
    """A JPEG and its KEY.json values: width, height, captions, `attributes` of each shape, `relation`, and `content`.

    `relation`: of the first shape in `attributes` to the second; None for a single shape. `content`: equal for scenes
    with the same captions.
    """
    choice = combinations(list(SIZES), held_out)
    chosen = [choice[rng.integers(len(choice))]]
    if max_objects > 1 and rng.random() < TWO_OBJECTS:
        others = [combination for combination in combinations(list(SIZES), False) if combination != chosen[0]]
        chosen.insert(int(rng.integers(2)), others[rng.integers(len(others))])
    items = [Item(*combination) for combination in chosen]
    cell = size // CELLS

    short = size * 3 // 4 // 16 * 16
    width, height = ((size, size), (size, short), (short, size))[rng.integers(3)]
    canvas = background(rng, width, height)
    choices = placements(width // cell, height // cell, *(SIZES[item.size] for item in items))
    relation, corners = choices[rng.integers(len(choices))]
    for item, (x, y) in zip(items, corners, strict=True):
        diameter = SIZES[item.size] * cell
        paint(canvas, item.shape, item.colour, diameter, (x * cell + diameter / 2, y * cell + diameter / 2), cell)

    file = io.BytesIO()
    canvas.save(file, "JPEG", quality=90, subsampling=0)  # full-resolution colour, which the captions name
    return file.getvalue(), {
        "width": width,
        "height": height,
        "captions": _captions(rng, items, relation),
        "attributes": [vars(item) for item in items],
        "relation": relation,
        "content": _content(items, relation),
    }


@cache
def placements(columns: int, rows: int, first: int, second: int = 0) -> list[tuple[str | None, tuple[Corner, ...]]]:
    """All ways to place one or two shapes of these sizes, and the relation of the first to the second.

    Two shapes do not overlap along the axis of their relation, and their distance is greater along it than across it.
    """
    at_first = list(product(range(columns - first + 1), range(rows - first + 1)))
    if not second:
        return [(None, (corner,)) for corner in at_first]
    found: list[tuple[str | None, tuple[Corner, ...]]] = []
    for a, b in product(at_first, product(range(columns - second + 1), range(rows - second + 1))):
        # Twice the distances from the first centre to the second, in cells.
        dx, dy = (2 * (end - start) + second - first for start, end in zip(a, b, strict=True))
        if abs(dx) != abs(dy) and max(abs(dx), abs(dy)) >= first + second:
            horizontal = abs(dx) > abs(dy)
            relation = ("left of" if dx > 0 else "right of") if horizontal else ("above" if dy > 0 else "below")
            found.append((relation, (a, b)))
    return found


def _content(items: list[Item], relation: str | None) -> str:
    if relation is None:
        return str(items[0])
    first, second = items
    return min(f"{first} {relation} {second}", f"{second} {RELATIONS[relation]} {first}")


def _captions(rng: np.random.Generator, items: list[Item], relation: str | None) -> list[str]:
    """All captions of the scene, in random order."""
    if relation is None:
        item = article(str(items[0]))
        sentences = [item, f"there is {item}", f"one {items[0]}"]
    else:
        first, second = (article(str(item)) for item in items)
        inverse = RELATIONS[relation]
        sentences = [
            f"{first} {relation} {second}",
            f"{second} {inverse} {first}",
            f"there is {first} {relation} {second}",
            f"{second} is {inverse} {first}",
        ]
    return [sentences[i] for i in rng.permutation(len(sentences))]
