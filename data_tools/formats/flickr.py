"""Flickr8k and Flickr30k as published: a file with one caption per line beside a folder of photos."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data_tools.formats import Record
from data_tools.formats.tables import existing_folder, read_text
from dsmoe_vl.errors import DataError

NAME = "flickr"
HELP = "Flickr8k and Flickr30k (captions.txt, *.token, results.csv)"
DESCRIPTION = """\
Expected files:

    flickr30k/
      results_20130124.token          1000092795.jpg#0<TAB>Two young guys ...
      flickr30k-images/1000092795.jpg

The captions may also be in Flickr8k.token.txt, or in a table with one of these headers; the first line decides:

    image,caption
    image_name,comment_number,comment
    image_name| comment_number| comment

A malformed line is rejected; the image keeps its other captions. For the splits of published results, see the format
`karpathy`.

Example:

    python -m data_tools.convert flickr --images flickr30k/flickr30k-images \\
        --captions flickr30k/results_20130124.token --output shards/flickr30k
"""

Caption = tuple[str, str]  # name of the image, text
_TOKEN_LINE = re.compile(r"([^\t]*\.[^\t]*)#\d+\t(.*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--images` and `--captions`."""
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the photos")
    parser.add_argument(
        "--captions", type=Path, required=True, metavar="FILE", help="captions.txt, *.token, results.csv"
    )


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per image, in the order of first mention, then one per malformed line.

    Raises DataError if the file is missing or has another first line, or the folder is missing.
    """
    path: Path = arguments.captions
    folder = existing_folder(arguments.images, "--images")
    lines = [(line, text) for line, text in enumerate(read_text(path, "--captions").split("\n"), 1) if text.strip()]
    first = lines[0][1] if lines else ""
    parse = _parser(first)
    if parse is None:
        raise DataError(
            f"--captions {path}: its first line is {first[:80]!r}: expected are 'image.jpg#0<TAB>caption' or a header, "
            "'image,caption' or 'image_name| comment_number| comment'"
        )
    captions: dict[str, list[str]] = {}
    malformed = []
    for line, text in lines if parse is _token_caption else lines[1:]:
        caption = parse(text)
        if caption:
            captions.setdefault(caption[0], []).append(caption[1])
        else:
            problem = f"malformed line: {path.name}, line {line}: {text[:80]!r}"
            malformed.append(Record(f"line {line}", "image", None, [], problem=problem))
    for name, texts in captions.items():
        yield Record(name.removesuffix(".jpg"), "image", folder / name, texts)
    yield from malformed


def _parser(first: str) -> Callable[[str], Caption | None] | None:
    """The parser of a file's lines, by its first line; None for an unknown file."""
    if _TOKEN_LINE.fullmatch(first):
        return _token_caption
    for delimiter in ",|":
        names = [name.strip().lower() for name in first.split(delimiter)]
        if (names[0], names[-1]) in (("image", "caption"), ("image_name", "comment")):
            return partial(_table_caption, delimiter=delimiter, columns=len(names))
    return None


def _token_caption(line: str) -> Caption | None:
    """`image.jpg#0<TAB>caption`."""
    found = _TOKEN_LINE.fullmatch(line)
    return (found[1].strip(), found[2]) if found else None


def _table_caption(line: str, delimiter: str, columns: int) -> Caption | None:
    """Image, numbers, and the caption, which may contain the delimiter.

    Not by csv.reader, for which a stray quote would begin a cell and swallow all captions up to the next quote.
    """
    cells = [cell.strip() for cell in line.split(delimiter, columns - 1)]
    if len(cells) < columns or "." not in cells[0] or not all(number.isdigit() for number in cells[1:-1]):
        return None
    name, text = cells[0], cells[-1]
    if delimiter == "," and text.startswith('"'):
        try:
            (text,) = next(csv.reader([text], strict=True))
        except (csv.Error, ValueError):  # unbalanced quotes, or text after the closing one
            return None
    return name, text
