"""What all drawings with Pillow share: pictures made to fit, text broken into lines, round numbers on an axis."""

from __future__ import annotations

import math

from PIL import Image, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """As large as fits into `size` pixels, mode "RGB"; small pictures are enlarged."""
    scale = min(size[0] / picture.width, size[1] / picture.height)
    new = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(new, Image.Resampling.LANCZOS)


def wrapped(text: str, font: Font, width: float) -> list[str]:
    """`text` in lines of at most `width` pixels; a longer word has a line of its own. At least one line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def round_ticks(end: float, most: int) -> list[float]:
    """Round numbers from 0 to `end` in equal steps, at most `most` steps."""
    power = 10.0 ** math.floor(math.log10(end / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if end / (power * factor) <= most)
    return [round(number * step, 6) for number in range(int(end / step + 1e-9) + 1)]
