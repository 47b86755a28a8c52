"""Inline SVG for a report: the importance of a video's frames over time, and loads of experts by layer.

Without `xmlns`, which HTML does not need. Colours are classes of `report_style.py`, so that they follow the reader's
dark mode. Shapes: N sparse layers, E experts of the widest layer.
"""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from dsmoe_vl.report.content import Storyboard
from dsmoe_vl.report.text import said

_WIDTH, _HEIGHT = 1000, 100  # of the curve's own units; the page stretches them
_DOTS = 64  # frames whose points are drawn
_MAP_WIDTH = 640  # pixels, as are all below: of all experts, where they can be as wide as wanted
_CELL = (3, 36)  # least and greatest width of a cell
_ROW = 22
_DEEP = 0.75  # from here on a number is drawn in the page's colour, which is then easier to read
_NUMBERS_FROM = 28  # width of a cell that holds a number
_MARGIN = (54, 34)  # room for names at the left and above
_CELLS_AS_PICTURE = 1500  # more cells than this are one PNG, of a pixel each
_HEAT = (47, 125, 209)  # of the PNG, which cannot know the page's colours: seen on white and on black


def importance_chart(board: Storyboard) -> str:
    """Predicted and annotated importance, 0 to 1, over seconds; key frames marked. HTML."""
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
    area = f"{steps}V{_HEIGHT}H0Z"
    points = [(x(float(second)), y(float(v))) for second, v in zip(board.seconds, board.importance, strict=True)]
    line = "M" + "L".join(f"{px} {py}" for px, py in points)
    dots = "".join(f"M{px} {py}h0" for px, py in points) if len(points) <= _DOTS else ""
    stems = "".join(f"M{points[key][0]} {points[key][1]}V{_HEIGHT}" for key in board.key_frames)
    keys = "".join(f"M{points[key][0]} {points[key][1]}h0" for key in board.key_frames)
    grid = "".join(f"M0 {height}H{_WIDTH}" for height in (0, _HEIGHT // 2, _HEIGHT))
    layers = {"grid": grid, "area": area, "truth": steps, "stems": stems, "line": line, "dots": dots, "keys": keys}
    paths = "".join(f'<path class="{name}" d="{path}"/>' for name, path in layers.items() if path)
    ticks = _ticks(end)
    marks = "".join(
        f'<span style="left:{100 * tick / end:.2f}%"{_last(tick, end)}>{tick:g}{" s" * (tick == ticks[-1])}</span>'
        for tick in ticks
    )
    label = said(f"Predicted and annotated importance of the frames of {board.key} over {end:.1f} seconds")
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none"'
    return (
        '<div class="chart"><div class="y"><span style="top:0">1</span><span style="top:50%">0.5</span>'
        '<span style="top:100%">0</span></div>'
        f'<svg {box} role="img" aria-label="{label}">{paths}</svg>'
        f'<div class="x">{marks}</div></div>'
    )


def load_map(shares: np.ndarray, top: float, layers: list[int], experts: list[int], title: str) -> str:
    """Shares [N, E] of each layer's assignments, 0 to 1; the deepest colour is `top`. Layers by their numbers, with as
    many experts as they have. SVG."""
    count = shares.shape[1]
    cell = min(max(round(_MAP_WIDTH / count), _CELL[0]), _CELL[1])
    left, above = _MARGIN
    width, height = left + cell * count + 1, above + _ROW * len(layers) + 1
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 30) if step * cell >= 24)
    parts = [f'<text class="faint" x="{left}" y="12">expert</text>']
    parts += [
        f'<text class="faint" x="{left + cell * e + cell / 2:g}" y="28" text-anchor="middle">{e}</text>'
        for e in range(0, count, every)
    ]
    for row, layer in enumerate(layers):
        middle = above + _ROW * row + 15
        parts.append(f'<text class="faint" x="{left - 8}" y="{middle}" text-anchor="end">layer {layer}</text>')
    if shares.size > _CELLS_AS_PICTURE:
        box = f'x="{left}" y="{above}" width="{cell * count}" height="{_ROW * len(layers)}"'
        parts.append(f'<image {box} preserveAspectRatio="none" href="{_picture(shares, top)}"/>')
        parts.append(f'<rect class="edge" {box}/>')
    else:
        for row, layer in enumerate(layers):
            for expert in range(experts[row]):
                corner = left + cell * expert, above + _ROW * row
                parts.append(_cell(float(shares[row, expert]), top, corner, cell, f"layer {layer}, expert {expert}"))
    return (
        f'<svg class="map" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{said(title)}">{"".join(parts)}</svg>'
    )


def data_uri(data: bytes, kind: str) -> str:
    """A picture's bytes, "jpeg" or "png", as an address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _cell(share: float, top: float, corner: tuple[int, int], width: int, name: str) -> str:
    depth = min(share / top, 1.0) if top else 0.0
    x, y = corner
    box = f'x="{x}" y="{y}" width="{width}" height="{_ROW}"'
    text = ""
    if width >= _NUMBERS_FROM:
        deep = ' class="deep"' if depth > _DEEP else ""
        text = f'<text{deep} x="{x + width / 2:g}" y="{y + 15}" text-anchor="middle">{_percent(share)}</text>'
    tip = f"<title>{name}: {100 * share:.1f} %</title>"
    return f'<g>{tip}<rect class="cell" {box} fill-opacity="{depth:.3f}"/><rect class="edge" {box}/>{text}</g>'


def _percent(share: float) -> str:
    """Without a sign: the title says that these are percent."""
    percent = 100 * share
    return "0" if percent == 0 else "&lt;1" if percent < 0.95 else f"{percent:.0f}"


def _picture(shares: np.ndarray, top: float) -> str:
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.rint(255 * np.clip(shares / (top or 1.0), 0, 1))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "png")


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 to `end`, at most seven."""
    power = 10.0 ** math.floor(math.log10(end / 6))
    step = next(power * factor for factor in (1, 2, 5, 10) if end / (power * factor) <= 6)
    return [round(number * step, 6) for number in range(int(end / step + 1e-9) + 1)]


def _last(tick: float, end: float) -> str:
    """A number at the right border stands left of it, so that nothing sticks out of the page."""
    return ' class="last"' if tick > 0.96 * end else ""
