"""A sheet of held-out samples: pictures on the left, texts beside them, importance curves on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsmoe_vl.drawing.canvas import fitted, wrapped

_TITLE, _TEXT, _SMALL = (ImageFont.load_default(size) for size in (16, 13, 11))
_INK, _FAINT, _RULE, _RIGHT = (25, 25, 28), (115, 115, 122), (228, 228, 232), (38, 138, 84)
_TRUTH, _PREDICTED = (150, 150, 158), (31, 94, 168)
_PICTURE, _FRAME, _HIT = (180, 120), (110, 82), (72, 54)  # pixels, at most
_STRIP, _WORDS, _CURVE, _MARGIN, _LEADING = 236, 470, 250, 16, 17
_WRITTEN = ("caption", "summary", "transcript")  # labels of what the model wrote


@dataclass(frozen=True)
class Curves:
    """Importance of a video's frames in [0, 1], float [f] each: predicted and annotated."""

    seconds: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Row:
    """One sample. `texts`: (label, text); `hits`: (picture, whether it is the right one) found by retrieval."""

    name: str
    pictures: Sequence[Image.Image]
    texts: Sequence[tuple[str, str]]
    hits: Sequence[tuple[Image.Image, bool]]
    curves: Curves | None


def draw(title: str, rows: Sequence[Row]) -> Image.Image:
    """The sheet, as high as its rows need."""
    has_curves = any(row.curves is not None for row in rows)
    width = 2 * _MARGIN + _STRIP + _WORDS + (_MARGIN + _CURVE if has_curves else 0)
    drawn = [_row(row, width) for row in rows]
    sheet = Image.new("RGB", (width, 44 + sum(image.height for image in drawn)), "white")
    ImageDraw.Draw(sheet).text((_MARGIN, 14), title, _INK, _TITLE)
    y = 44
    for image in drawn:
        sheet.paste(image, (0, y))
        y += image.height
    return sheet


def _row(row: Row, width: int) -> Image.Image:
    strip = _strip(row.pictures)
    words = [(label, line) for label, text in row.texts for line in _lines(text)]
    text_height = (1 + len(words)) * _LEADING + 4
    hits_height = _HIT[1] + 8 if row.hits else 0
    height = max(strip.height, text_height + hits_height, 112 if row.curves is not None else 0) + 2 * 10
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.line((_MARGIN, 0, width - _MARGIN, 0), _RULE)
    image.paste(strip, (_MARGIN, 10))
    x, y = _MARGIN + _STRIP, 10
    pen.text((x, y), row.name, _FAINT, _SMALL)
    last = ""
    for label, line in words:
        y += _LEADING
        if label != last:
            pen.text((x, y), label, _FAINT, _TEXT)
        last = label
        pen.text((x + 74, y), line, _PREDICTED if label in _WRITTEN else _INK, _TEXT)
    for hit, is_right in row.hits:
        small = fitted(hit, _HIT)
        image.paste(small, (x + 74, 10 + text_height + 4))
        if is_right:
            corner = (x + 74, 10 + text_height + 4)
            pen.rectangle((*corner, corner[0] + small.width - 1, corner[1] + small.height - 1), None, _RIGHT, 3)
        x += small.width + 6
    if row.curves is not None:
        image.paste(_curves(row.curves), (_MARGIN + _STRIP + _WORDS + _MARGIN, 6))
    return image


def _strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture, or frames in two columns; of a recording alone, nothing."""
    size = _PICTURE if len(pictures) == 1 else _FRAME
    small = [fitted(picture, size) for picture in pictures]
    columns = 1 if len(small) == 1 else 2
    lines = [small[start : start + columns] for start in range(0, len(small), columns)]
    heights = [max(picture.height for picture in line) for line in lines]
    strip = Image.new("RGB", (_STRIP - 14, sum(heights) + 4 * max(len(lines) - 1, 0)), "white")
    y = 0
    for line, height in zip(lines, heights, strict=True):
        x = 0
        for picture in line:
            strip.paste(picture, (x, y))
            x += picture.width + 4
        y += height + 4
    return strip


def _lines(text: str, most: int = 4) -> list[str]:
    """At most `most` lines that fit beside their label; the rest is cut."""
    room = _WORDS - 74
    lines = wrapped(text or "(nothing)", _TEXT, room)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    while any(_TEXT.getlength(line) > room for line in lines):  # a very long word
        lines = [line if _TEXT.getlength(line) <= room else line[: int(0.9 * len(line))] for line in lines]
    return lines


def _curves(curves: Curves, scale: int = 3) -> Image.Image:
    """Predicted and annotated importance; drawn large and scaled down, for smooth lines."""
    height, left, top, bottom = 112, 24, 20, 96
    image = Image.new("RGB", (_CURVE * scale, height * scale), "white")
    pen = ImageDraw.Draw(image)
    end = max(float(curves.seconds[-1]), 1e-6)

    def at(second: float, value: float) -> tuple[float, float]:
        x = left + (_CURVE - left - 8) * second / end
        return x * scale, (bottom - (bottom - top) * min(max(value, 0.0), 1.0)) * scale

    for value in (0.0, 0.5, 1.0):
        pen.line((at(0, value), at(end, value)), _RULE, scale)
    for values, colour in ((curves.truth, _TRUTH), (curves.predicted, _PREDICTED)):
        points = [at(float(second), float(value)) for second, value in zip(curves.seconds, values, strict=True)]
        pen.line(points, colour, 2 * scale, joint="curve")
        for x, y in points:
            pen.ellipse((x - 2 * scale, y - 2 * scale, x + 2 * scale, y + 2 * scale), colour)
    image = image.resize((_CURVE, height), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(image)
    for value in (0, 1):
        pen.text((left - 6, at(0, value)[1] / scale), str(value), _FAINT, _SMALL, anchor="rm")
    pen.text((left, 2), "importance", _PREDICTED, _SMALL)
    pen.text((left + 66, 2), "annotated", _TRUTH, _SMALL)
    pen.text((_CURVE - 8, bottom + 3), f"{end:.1f} s", _FAINT, _SMALL, anchor="ra")
    return image
