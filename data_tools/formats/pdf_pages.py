"""Pages of PDF files by pdfium: their pictures and their texts. Lengths on a page are points, 72 an inch."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.formats import Rendered
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.files import require_regular

INSTALL = "pip install 'dsmoe-vl[documents]'"
_POINTS_PER_INCH = 72
_LEAST_SIDE = 1.0  # points; a page without an area shows nothing
# What pdfium puts in place of a hyphen at the end of a line, and the line's end behind it: the word goes on.
_HYPHENS = re.compile("[\x02\ufffe][\r\n]*")
_UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class Page(Rendered):
    """A page as a PNG. `number`: from 1. `dpi`: pixels an inch, fewer if there would be more than `most_pixels`."""

    number: int
    dpi: float
    most_pixels: int

    def __str__(self) -> str:
        return f"{self.path}, page {self.number}"

    def read_bytes(self) -> bytes:
        """See `Rendered`. Raises DataError if the page cannot be rendered."""
        with opened(self.path) as document:
            try:
                page = document[self.number - 1]
                width, height = page.get_size()
                scale = _scale(width, height, self.dpi, self.most_pixels)
                picture = page.render(scale=scale).to_pil().convert("RGB")
            except DataError:
                raise
            except Exception as error:  # pdfium's errors, and sizes that cannot be
                raise DataError(f"page cannot be rendered: {error}") from error
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()


def imported() -> Any:
    """pypdfium2. Raises ConfigError if it is missing."""
    try:
        import pypdfium2
    except ImportError as error:
        raise ConfigError(f"the format pdf needs pypdfium2: {INSTALL}") from error
    return pypdfium2


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The document in a file. Raises OSError, and DataError as `reason: detail` if it is encrypted or broken."""
    pdfium = imported()
    require_regular(path).stat()
    try:
        document = pdfium.PdfDocument(path)
    except pdfium.PdfiumError as error:
        if error.err_code == pdfium.raw.FPDF_ERR_PASSWORD:
            raise DataError("encrypted PDF: it opens with a password alone: store it without one") from error
        raise DataError(f"broken PDF: {error}") from error
    try:
        yield document
    finally:
        document.close()


def page_texts(document: Any) -> Iterator[tuple[str, str]]:
    """Of every page its text in one line, "" without any, and why it cannot be read, as `reason: detail`, or ""."""
    for number in range(len(document)):
        try:
            page = document[number]
            text = page.get_textpage().get_text_bounded()
            page.close()
        except Exception as error:  # pdfium's errors
            yield "", f"unreadable page: {error}"
            continue
        yield _in_one_line(text), ""


def _in_one_line(text: str) -> str:
    return " ".join(_UNPRINTABLE.sub(" ", _HYPHENS.sub("", text)).split())


def _scale(width: float, height: float, dpi: float, most_pixels: int) -> float:
    """Pixels a point for a page of these points. Raises DataError for a page without an area."""
    if not (min(width, height) >= _LEAST_SIDE and math.isfinite(width * height)):
        raise DataError(f"page cannot be rendered: it has {width:g} x {height:g} points")
    scale = min(dpi / _POINTS_PER_INCH, math.sqrt(most_pixels / (width * height)))
    # pdfium rounds sides up.
    while math.ceil(width * scale) * math.ceil(height * scale) > most_pixels:
        scale *= 0.99
    return scale
