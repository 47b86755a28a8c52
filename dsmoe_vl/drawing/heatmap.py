"""Heat maps drawn with Pillow: titled panels of coloured cells, and sheets of panels with their scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_FONT = ImageFont.load_default(12)
_SMALL = ImageFont.load_default(10)
_INK, _FAINT, _PAPER, _ABSENT = (32, 32, 36), (110, 110, 118), (255, 255, 255), (226, 226, 230)
_GAP, _LABELS, _HEAD, _FOOT = 16, 30, 20, 16  # pixels


@dataclass(frozen=True)
class Scale:
    """Colours for values from `low` to `high`; values beyond are clipped, NaN is grey."""

    name: str
    low: float
    high: float
    colours: tuple[tuple[int, int, int], ...]  # from low to high, evenly spaced
    logarithmic: bool = False

    def paint(self, values: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Values [...] -> RGB [..., 3]."""
        position = self._position(values) * (len(self.colours) - 1)
        stops = np.arange(len(self.colours))
        table = np.array(self.colours, dtype=np.float64)
        painted = np.stack([np.interp(position, stops, table[:, channel]) for channel in range(3)], -1)
        return np.where(np.isnan(values)[..., None], _ABSENT, painted).astype(np.uint8)

    def _position(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.clip(np.nan_to_num(values, nan=self.low), self.low, self.high)
        low, high = self.low, self.high
        if self.logarithmic:
            values, low, high = np.log(values), float(np.log(low)), float(np.log(high))
        return (values - low) / (high - low)

    def legend(self, width: int) -> Image.Image:
        """A colour bar, labelled at both ends and in the middle."""
        image = Image.new("RGB", (width, 40), _PAPER)
        draw = ImageDraw.Draw(image)
        ramp = np.linspace(0, 1, width)
        ends = np.log([self.low, self.high]) if self.logarithmic else np.array([self.low, self.high])
        values = ends[0] + ramp * (ends[1] - ends[0])
        bar = self.paint(np.exp(values) if self.logarithmic else values)
        image.paste(Image.fromarray(np.repeat(bar[None], 8, 0)), (0, 16))
        draw.text((0, 0), self.name, _INK, _SMALL)
        middle = float(np.exp(ends.mean())) if self.logarithmic else float(ends.mean())
        for x, value, anchor in ((0, self.low, "la"), (width // 2, middle, "ma"), (width - 1, self.high, "ra")):
            draw.text((x, 26), f"{value:.3g}", _FAINT, _SMALL, anchor=anchor)
        return image


def load_scale() -> Scale:
    """For loads over an even share: dead is dark blue, even white, overloaded dark red."""
    blue_to_red = ((20, 45, 110), (70, 130, 200), (245, 245, 245), (235, 130, 90), (130, 15, 35))
    return Scale("load over an even share", 1 / 8, 8.0, blue_to_red, logarithmic=True)


def rising_scale(name: str, high: float) -> Scale:
    """For values from 0 up: white to dark violet."""
    return Scale(name, 0.0, high, ((250, 250, 250), (170, 200, 225), (90, 120, 190), (70, 30, 110)))


@dataclass(frozen=True)
class Panel:
    """One heat map. values [rows, columns]; `columns`: names of the first and the last one; `axis`: their label."""

    title: str
    values: NDArray[np.float64]
    scale: Scale
    rows: Sequence[str]
    columns: tuple[str, str]
    axis: str

    def draw(self, width: int, row_height: int) -> Image.Image:
        """The picture, `width` pixels wide including the labels."""
        rows, columns = self.values.shape
        inner = width - _LABELS
        cells = Image.fromarray(self.scale.paint(self.values)).resize((inner, rows * row_height), Image.Resampling.BOX)
        if columns <= inner and rows:  # whole cells, with lines between them if there is room
            cells = self._cells(inner, row_height)
        image = Image.new("RGB", (width, _HEAD + rows * row_height + _FOOT), _PAPER)
        image.paste(cells, (_LABELS, _HEAD))
        draw = ImageDraw.Draw(image)
        draw.text((_LABELS, 2), self.title, _INK, _FONT)
        every = max(1, -(-11 // row_height))
        for row in range(0, rows, every):
            draw.text((_LABELS - 4, _HEAD + row * row_height + row_height // 2), self.rows[row], _FAINT, _SMALL, "rm")
        foot = _HEAD + rows * row_height + 2
        draw.text((_LABELS, foot), self.columns[0], _FAINT, _SMALL)
        if columns > 1:
            draw.text((_LABELS + inner // 2, foot), self.axis, _FAINT, _SMALL, "ma")
            draw.text((width - 1, foot), self.columns[1], _FAINT, _SMALL, "ra")
        return image

    def _cells(self, width: int, row_height: int) -> Image.Image:
        columns = self.values.shape[1]
        left = np.arange(width) * columns // width
        painted = self.scale.paint(self.values)[:, left].repeat(row_height, 0)
        if columns * 6 <= width:
            painted[:, 1:][:, left[1:] != left[:-1]] = _PAPER
        if row_height >= 8:
            painted[row_height - 1 :: row_height] = _PAPER
        return Image.fromarray(painted)


def sheet(title: str, blocks: Sequence[Sequence[Panel]], columns: int = 4, panel_width: int = 250) -> Image.Image:
    """Blocks of panels from top to bottom, at most `columns` in a row, and the colour scales below."""
    drawn: list[list[Image.Image]] = []
    scales: dict[str, Scale] = {}
    for block in blocks:
        for start in range(0, len(block), columns):
            line = block[start : start + columns]
            scales |= {panel.scale.name: panel.scale for panel in line}
            drawn.append([panel.draw(panel_width, _row_height(len(panel.values))) for panel in line])
    widest = max((len(line) for line in drawn), default=1)
    width = _GAP + max(widest, min(len(scales), columns)) * (panel_width + _GAP)
    heights = [max(image.height for image in line) for line in drawn]
    legends = [scale.legend(panel_width - _LABELS) for scale in scales.values()]
    legend_lines = -(-len(legends) // columns)
    image = Image.new("RGB", (width, 36 + sum(h + _GAP // 2 for h in heights) + 48 * legend_lines), _PAPER)
    ImageDraw.Draw(image).text((_GAP + _LABELS, 10), title, _INK, _FONT)
    y = 36
    for pictures, height in zip(drawn, heights, strict=True):
        for index, picture in enumerate(pictures):
            image.paste(picture, (_GAP + index * (panel_width + _GAP), y))
        y += height + _GAP // 2
    for index, legend in enumerate(legends):
        x = _GAP + _LABELS + index % columns * (panel_width + _GAP)
        image.paste(legend, (x, y + 48 * (index // columns)))
    return image


def _row_height(rows: int) -> int:
    return max(4, min(22, 160 // max(rows, 1)))
