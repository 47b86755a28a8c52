"""Pages of PDF files as pictures, with their own texts or with captions of a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record
from data_tools.formats.caption_files import CaptionFile
from data_tools.formats.pdf_pages import Page, imported, opened, page_texts
from data_tools.formats.tables import existing_folder
from dsmoe_vl.data.folder_walk import described, files_below
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.files import require_regular

NAME = "pdf"
HELP = "pages of PDF files as pictures, with their own texts or a table of captions"
DESCRIPTION = """\
Expected files:

    filings/
      2024/a.pdf             PDF files, by their content and not by their names
      captions.csv           file,text                       or tsv, jsonl, parquet; or a .json,
                             2024/a.pdf#page=3,revenue grew    {"2024/a.pdf#page=3": "revenue grew"}

Every page becomes a PNG of --dpi pixels an inch, at most --megapixels. Its caption is its own text in one line, in the
order in which the file draws it; with --captions, the pages that it names have its captions, and others are not used.
Encrypted and broken files and pages without a text, as scans have, are rejected.

Example:

    python -m data_tools.convert pdf --documents filings --dpi 100 --output shards/filings
"""

_MAGIC = b"%PDF-"
_HEAD = 1024  # bytes in which it stands
_OTHER = "no PDF file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--documents`, `--captions`, `--dpi` and `--megapixels`."""
    parser.add_argument("--documents", type=Path, required=True, metavar="DIR", help="folder of the PDF files")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="captions by path and page, a.pdf#page=1")
    parser.add_argument("--dpi", type=float, default=100.0, metavar="N", help="pixels an inch (%(default)g)")
    parser.add_argument(
        "--megapixels",
        type=float,
        default=8.0,
        metavar="N",
        help="of a page, at most; larger ones get fewer dpi (%(default)g)",
    )


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per page, in the order of paths and pages, and one per file that cannot be opened.

    Raises DataError if the folder or the table cannot be used, ConfigError for sizes without a meaning or if pypdfium2
    is missing.
    """
    imported()
    for option, value, least, most in (("dpi", arguments.dpi, 1, 2400), ("megapixels", arguments.megapixels, 0.01, 64)):
        if not least <= value <= most:
            raise ConfigError(f"--{option} {value:g}: give {least} to {most}")
    folder = existing_folder(arguments.documents, "--documents")
    captions = CaptionFile(arguments.captions, "--captions") if arguments.captions else None
    arguments.left = []  # for `unused`, which is called when all records are read
    files, passed = files_below(folder)
    known, uncaptioned, found_any = "", 0, False
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            if not _is_pdf(path):
                passed.append((path, _OTHER))
                continue
            found_any = True
            with opened(path) as document:
                found = page_texts(document) if captions is None else [("", "")] * len(document)
                for number, (text, problem) in enumerate(found, 1):
                    identifier = f"{name}#page={number}"
                    known = known or identifier
                    texts: list[Any] = captions.of((identifier,)) if captions else [text]
                    if captions and not texts:
                        uncaptioned += 1
                        continue
                    page = Page(path, number, arguments.dpi, round(arguments.megapixels * 1e6))
                    if captions is None and not text:
                        problem = problem or f"page without a text: {page}: name texts with --captions"
                    yield Record(identifier, "image", None if problem else page, texts, problem=problem)
        except OSError as error:
            yield Record(name, "image", None, [], problem=f"unreadable file: {path}: {error.strerror}")
        except DataError as error:
            reason, _, detail = str(error).partition(": ")
            yield Record(name, "image", None, [], problem=f"{reason}: {path}: {detail}")
    if not found_any:
        raise DataError(f"--documents {folder}: no PDF file is there, but {described(passed, folder) or 'nothing'}")
    if captions:
        captions.require_use(known)
        arguments.left += [f"{uncaptioned} pages without a caption" if uncaptioned else "", captions.unused()]
    arguments.left.append(described(passed, folder))


def unused(arguments: argparse.Namespace) -> str:
    """Files that are no PDF, pages without a caption, and captions without a page; "" without any."""
    return ", ".join(filter(None, arguments.left))


def _is_pdf(path: Path) -> bool:
    """Raises OSError."""
    with require_regular(path).open("rb") as file:
        return _MAGIC in file.read(_HEAD)
