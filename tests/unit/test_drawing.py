"""Pages and curves: what is on them is where it belongs. How they look was looked at."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from dsmoe_vl.drawing.pages import MARK, Tile, curve, page, shortened, title_lines


def coloured(colour, size=(40, 30)):
    return Image.new("RGB", size, colour)


def test_tiles_stand_in_the_order_of_reading_and_marks_around_them():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    sheet = page([Tile(coloured(c), ("a", "b"), marked=n == 1) for n, c in enumerate(colours)], "title", columns=2)
    pixels = np.asarray(sheet)
    centres = [np.argwhere((pixels == c).all(-1)).mean(0) for c in colours]
    assert centres[0][1] < centres[1][1] and centres[0][0] == centres[1][0] < centres[2][0]
    marked = np.argwhere((pixels == MARK).all(-1))
    green = np.argwhere((pixels == colours[1]).all(-1))
    assert (marked.min(0) < green.min(0)).all() and marked[:, 1].min() > centres[0][1]


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (400, 10), (10, 400), (1, 1)])
def test_any_shape_fits(size):
    sheet = page([Tile(coloured("red", size), ("x" * 200,))], "a long title " * 30, beside=coloured("blue", size))
    assert 480 <= sheet.width < 1300 and sheet.height < 500


def test_pages_without_tiles_or_with_many():
    assert page([], "nothing").width == 480
    assert page([Tile(coloured("red"), ("a",))] * 23, "many", columns=5).height > 900


def test_names_keep_both_ends():
    font = ImageFont.load_default(size=15)
    assert shortened("short.jpg", 100) == "short.jpg"
    cut = shortened("a_very_long_name_of_a_holiday_video_0042.mp4", 150)
    assert font.getlength(cut) <= 150 and cut.startswith("a_very") and cut.endswith(".mp4") and "..." in cut
    lines = title_lines("one two three four five " + "w" * 90, 100)
    assert len(lines) > 2 and all(font.getlength(line) <= 100 for line in lines)
    assert " ".join(lines[:-1]) == "one two three four five"


def test_the_curve_passes_through_its_points():
    seconds, values = np.array([0, 5, 10], np.float32), np.array([0.0, 1.0, 0.5], np.float32)
    pixels = np.asarray(curve(seconds, values, [1], "title")).astype(int)
    row, column = np.argwhere(pixels[..., 0] - pixels[..., 2] > 60).T  # of the colour of marks
    assert abs(np.median(column) - (52 + 876) / 2) < 3  # 5 s is the middle of the axis
    assert row.min() < 62 and row.max() > 260  # the label, the point, and a line down to the axis


@pytest.mark.parametrize("seconds", [[0.0], [0.0, 0.04], [0.0, 1e4], [0.02], list(np.linspace(0, 3, 64))], ids=len)
def test_curves_of_any_length(seconds):
    values = np.linspace(0, 1, len(seconds), dtype=np.float32)
    assert curve(np.array(seconds, np.float32), values, range(len(seconds)), "t" * 200).size == (900, 320)
