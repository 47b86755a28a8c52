"""The geometry of the report's charts: importance of a video's frames over time, and expert load by layer.

Shapes: N sparse layers, E experts of the widest layer, f sampled frames.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dsmoe_vl.drawing.canvas import round_ticks
from dsmoe_vl.report.content import Storyboard

_WIDTH, _HEIGHT = 1000, 100  # units of the curve's SVG box; the page stretches it
_DOTS = 64  # with more frames than this, no points are drawn
_MAP_WIDTH = 640  # pixels, like all below: width of all experts, if cells are within their limits
_CELL = (3, 36)  # minimum and maximum cell width
_ROW = 22
_MARGIN = (54, 34)  # left and top, for names
_COLUMN = 24  # width of an expert's number
_CELLS_AS_PICTURE = 1500  # with more cells than this, the map is one PNG with a pixel per cell
_HEAT = (47, 125, 209)  # colour of the PNG, visible on a light and a dark page


@dataclass(frozen=True)
class Tick:
    """A number under a curve, at `percent` of its width. `at_border`: written to the left, to stay inside the page."""

    seconds: float
    percent: float
    at_border: bool


@dataclass(frozen=True)
class ImportanceChart:
    """`paths`: SVG paths by name in a box of `width` x `height`, from back to front; some are empty. `seconds`: length
    of the axis."""

    width: int
    height: int
    seconds: float
    paths: dict[str, str]
    ticks: list[Tick]


@dataclass(frozen=True)
class Cell:
    """One expert of a layer; `x`, `y`: its corner in pixels. `share`: of the layer's assignments; `depth`: of its
    colour, 0 to 1; `percent`: the share as text, without a percent sign."""

    x: int
    y: int
    layer: int
    expert: int
    share: float
    depth: float
    percent: str


@dataclass(frozen=True)
class LoadMap:
    """Sizes and positions in pixels. The map itself is `cell * experts` x `row * len(rows)`, its corner at (`left`,
    `above`). `columns`: centres of the labelled experts; `rows`: upper ends by layer number. Either `cells` or
    `picture`, a PNG with a pixel per cell, is empty."""

    width: int
    height: int
    left: int
    above: int
    cell: int
    row: int
    experts: int
    columns: dict[int, float]
    rows: dict[int, int]
    cells: list[Cell]
    picture: bytes


def importance_chart(board: Storyboard) -> ImportanceChart:
    """Predicted and annotated importance, 0 to 1, over seconds; key frames marked."""
    end = max(board.duration_seconds, float(board.seconds[-1])) or 1.0

    def x(second: float) -> str:
        return f"{_WIDTH * second / end:.1f}"

    def y(value: float) -> str:
        return f"{_HEIGHT * (1 - min(max(value, 0.0), 1.0)):.1f}"

    parts = len(board.annotated)
    steps = f"M0 {y(float(board.annotated[0]))}" + "".join(
        f"V{y(float(value))}H{x((number + 1) * board.duration_seconds / parts)}"
        for number, value in enumerate(board.annotated)
    )
    points = [(x(float(second)), y(float(v))) for second, v in zip(board.seconds, board.importance, strict=True)]
    paths = {
        "grid": "".join(f"M0 {height}H{_WIDTH}" for height in (0, _HEIGHT // 2, _HEIGHT)),
        "area": f"{steps}V{_HEIGHT}H0Z",
        "truth": steps,
        "stems": "".join(f"M{points[key][0]} {points[key][1]}V{_HEIGHT}" for key in board.key_frames),
        "line": "M" + "L".join(f"{px} {py}" for px, py in points),
        "dots": "".join(f"M{px} {py}h0" for px, py in points) if len(points) <= _DOTS else "",
        "keys": "".join(f"M{points[key][0]} {points[key][1]}h0" for key in board.key_frames),
    }
    ticks = [Tick(seconds, 100 * seconds / end, seconds > 0.96 * end) for seconds in round_ticks(end, 6)]
    return ImportanceChart(_WIDTH, _HEIGHT, end, paths, ticks)


def load_map(shares: np.ndarray, top: float, layers: list[int], experts: list[int]) -> LoadMap:
    """Map of shares [N, E] of each layer's assignments, 0 to 1. `top` has the deepest colour; `layers` [N]: their
    numbers; `experts` [N]: experts of each layer."""
    count = shares.shape[1]
    cell = min(max(round(_MAP_WIDTH / count), _CELL[0]), _CELL[1])
    left, above = _MARGIN
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 30) if step * cell >= _COLUMN)
    rows = {layer: above + _ROW * row for row, layer in enumerate(layers)}
    depths = np.clip(shares / (top or 1.0), 0, 1)
    as_picture = shares.size > _CELLS_AS_PICTURE
    return LoadMap(
        width=left + cell * count + 1,
        height=above + _ROW * len(layers) + 1,
        left=left,
        above=above,
        cell=cell,
        row=_ROW,
        experts=count,
        columns={e: left + cell * e + cell / 2 for e in range(0, count, every)},
        rows=rows,
        cells=[] if as_picture else _cells(shares, depths, rows, experts, left, cell),
        picture=_picture(depths) if as_picture else b"",
    )


def _cells(
    shares: np.ndarray, depths: np.ndarray, rows: dict[int, int], experts: list[int], left: int, width: int
) -> list[Cell]:
    """One cell per expert; a narrower layer has fewer."""
    return [
        Cell(left + width * e, y, layer, e, float(share), float(depth), _percent(float(share)))
        for (layer, y), count, own_shares, own_depths in zip(rows.items(), experts, shares, depths, strict=True)
        for e, share, depth in zip(range(count), own_shares, own_depths, strict=False)
    ]


def _percent(share: float) -> str:
    percent = 100 * share
    return "0" if percent == 0 else "<1" if percent < 0.95 else f"{percent:.0f}"


def _picture(depths: np.ndarray) -> bytes:
    pixels = np.empty((*depths.shape, 4), np.uint8)
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.rint(255 * depths)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()
