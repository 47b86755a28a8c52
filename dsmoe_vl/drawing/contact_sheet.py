"""A page of thumbnails with captions, for a quick look at samples."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from dsmoe_vl.drawing.canvas import wrapped

PAGE_WIDTH = 1280  # pixels, like all sizes here
THUMBNAIL_HEIGHT = 128
CELL_WIDTH = (128, 600)  # minimum (room for a caption) and maximum (two on a page)
FRAME_GAP = 2
GAP = 10
LINE_HEIGHT = 13
CAPTION_LINES = 4


@dataclass(frozen=True)
class Cell:
    """One sample: an image, or the frames of a video side by side, and its caption."""

    pictures: list[Image.Image]
    caption: str


def contact_sheet(cells: list[Cell]) -> Image.Image:
    """The cells in rows from left to right, mode "RGB"."""
    drawn = [_draw_cell(cell) for cell in cells]
    rows: list[list[Image.Image]] = []
    room = 0
    for image in drawn:
        if not rows or image.width + GAP > room:
            rows.append([])
            room = PAGE_WIDTH - GAP
        rows[-1].append(image)
        room -= image.width + GAP
    height = GAP + sum(max(image.height for image in row) + GAP for row in rows)
    page = Image.new("RGB", (PAGE_WIDTH, height), "white")
    top = GAP
    for row in rows:
        left = GAP
        for image in row:
            page.paste(image, (left, top))
            left += image.width + GAP
        top += max(image.height for image in row) + GAP
    return page


def _draw_cell(cell: Cell) -> Image.Image:
    width, height = cell.pictures[0].size
    scale = min(THUMBNAIL_HEIGHT / height, CELL_WIDTH[1] / (width * len(cell.pictures)))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    step = size[0] + FRAME_GAP
    cell_width = max(step * len(cell.pictures), CELL_WIDTH[0])
    font = ImageFont.load_default(size=11)
    lines = wrapped(cell.caption, font, cell_width)[:CAPTION_LINES]
    image = Image.new("RGB", (cell_width, size[1] + 2 + len(lines) * LINE_HEIGHT), "white")
    for number, picture in enumerate(cell.pictures):
        image.paste(picture.resize(size), (number * step, 0))
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, size[1] + 2 + number * LINE_HEIGHT), line, fill="black", font=font)
    return image
