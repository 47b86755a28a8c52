"""Pages of pictures with text under them, and a curve, drawn with Pillow. All sizes are in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsmoe_vl.drawing.canvas import fitted, round_ticks, wrapped

MARK = (214, 69, 0)  # colour of key frames
_INK, _FAINT, _EMPTY = (20, 20, 20), (110, 110, 110), (238, 238, 238)
_LINE = (31, 94, 168)
_GRID = (226, 226, 226)
_MARGIN, _GAP, _BORDER = 16, 12, 4
_TEXT, _TITLE = 15, 18  # font sizes
_LEADING = 20
_TITLE_LINES = 3
_SMOOTH = 3  # the curve is drawn this much larger and scaled down, for smooth lines


@dataclass(frozen=True)
class Tile:
    """A picture and the lines under it, the first one darker. `marked` draws a frame around it."""

    picture: Image.Image
    lines: tuple[str, ...]
    marked: bool = False


def page(
    tiles: Sequence[Tile], title: str, beside: Image.Image | None = None, columns: int = 5, width: int = 220
) -> Image.Image:
    """Tiles of `width` in rows, under a title of a few lines and a picture `beside` it, if given."""
    columns = max(1, min(columns, len(tiles)))
    page_width = max(_MARGIN * 2 + columns * (width + _GAP) - _GAP, 480)
    thumbnail = None if beside is None else fitted(beside, (140, 110))
    left = _MARGIN + (0 if thumbnail is None else thumbnail.width + _GAP)
    heading = title_lines(title, page_width - left - _MARGIN)
    if len(heading) > _TITLE_LINES:
        heading[_TITLE_LINES - 1 :] = [heading[_TITLE_LINES - 1] + " ..."]
    head = max(len(heading) * (_TITLE + 7), 0 if thumbnail is None else thumbnail.height)
    # All pictures have one height: the tallest picture's at this width, within limits.
    tallest = max((tile.picture.height / tile.picture.width for tile in tiles), default=0.75)
    height = round(width * min(max(tallest, 0.4), 1.0))
    lines = max((len(tile.lines) for tile in tiles), default=0)
    step = height + 8 + lines * _LEADING + _GAP
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (page_width, _MARGIN + head + _GAP + rows * step + _MARGIN - _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    if thumbnail is not None:
        sheet.paste(thumbnail, (_MARGIN, _MARGIN))
    for number, line in enumerate(heading):
        draw.text((left, _MARGIN + number * (_TITLE + 7)), line, _INK, _font(_TITLE))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        place = (_MARGIN + column * (width + _GAP), _MARGIN + head + _GAP + row * step)
        _draw_tile(sheet, tile, place, (width, height))
    return sheet


def curve(
    seconds: np.ndarray, values: np.ndarray, marked: Sequence[int], title: str, size: tuple[int, int] = (900, 320)
) -> Image.Image:
    """Values in [0, 1] over seconds, float32 [f] each, as a line; points `marked` are labelled with their times."""
    scale = _SMOOTH
    width, height = size
    left, right, top, bottom = 52, width - 24, 62, height - 48
    sheet = Image.new("RGB", (width * scale, height * scale), "white")
    draw = ImageDraw.Draw(sheet)
    end = float(seconds[-1]) or 1.0

    def at(second: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * second / end
        return x * scale, (bottom - (bottom - top) * min(max(value, 0.0), 1.0)) * scale

    def write(place: tuple[float, float], text: str, anchor: str, colour: tuple[int, int, int], high: int) -> None:
        draw.text((place[0] * scale, place[1] * scale), text, colour, _font(high * scale), anchor=anchor)

    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        draw.line((at(0, value), at(end, value)), _GRID, scale)
        write((left - 8, at(0, value)[1] / scale), f"{value:g}", "rm", _FAINT, 13)
    for tick in round_ticks(end, 10):
        x = at(tick, 0)[0]
        draw.line(((x, bottom * scale), (x, (bottom + 5) * scale)), _FAINT, scale)
        write((x / scale, bottom + 8), f"{tick:g}", "mt", _FAINT, 13)
    write(((left + right) / 2, height - 6), "seconds", "mb", _FAINT, 13)
    write((left, 12), shortened(title, right - left, _TITLE), "lt", _INK, _TITLE)
    points = [at(float(second), float(value)) for second, value in zip(seconds, values, strict=True)]
    for number in marked:
        draw.line((points[number], at(float(seconds[number]), 0)), MARK, scale)
    draw.line(points, _LINE, 3 * scale, joint="curve")
    last_label = -math.inf
    for number, (x, y) in enumerate(points):
        radius = (6 if number in marked else 3) * scale
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), MARK if number in marked else _LINE)
        text = f"{seconds[number]:.2f} s"
        half = _font(13).getlength(text) / 2
        middle = min(max(x / scale, left + half), width - half - 4)
        if number in marked and middle - half > last_label:  # labels must not overlap
            write((middle, y / scale - 10), text, "mb", MARK, 13)
            last_label = middle + half + 6
    return sheet.resize(size, Image.Resampling.LANCZOS)


def shortened(text: str, width: float, high: int = _TEXT) -> str:
    """`text`; if wider than `width` at font size `high`, its middle is cut out: both ends of a name are informative."""
    font = _font(high)
    if font.getlength(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 2 and font.getlength(_without_middle(text, kept)) > width:
        kept -= 1
    return _without_middle(text, kept)


def title_lines(text: str, width: float) -> list[str]:
    """A title in lines of at most `width` pixels; the middle of a longer word is cut out."""
    return [shortened(line, width, _TITLE) for line in wrapped(text, _font(_TITLE), width)]


def _draw_tile(sheet: Image.Image, tile: Tile, place: tuple[int, int], size: tuple[int, int]) -> None:
    """Draw a tile with its upper left corner at `place`, the picture centred in `size`."""
    draw = ImageDraw.Draw(sheet)
    (x, y), (width, height) = place, size
    draw.rectangle((x, y, x + width - 1, y + height - 1), _EMPTY)
    picture = fitted(tile.picture, size)
    sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    if tile.marked:
        around = (x - _BORDER, y - _BORDER, x + width - 1 + _BORDER, y + height - 1 + _BORDER)
        draw.rectangle(around, outline=MARK, width=_BORDER)
    for number, line in enumerate(tile.lines):
        colour = MARK if tile.marked and number == 0 else _FAINT if number else _INK
        draw.text((x, y + height + 8 + number * _LEADING), shortened(line, width), colour, _font(_TEXT))


def _font(high: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=high)


def _without_middle(text: str, kept: int) -> str:
    return text[: (kept + 1) // 2] + "..." + text[len(text) - kept // 2 :]
