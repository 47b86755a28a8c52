"""A folder of DICOM files, without what names a patient."""

from __future__ import annotations

import argparse
import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record
from data_tools.formats.caption_files import CaptionFile
from data_tools.formats.dicom_pixels import Picture, imported, in_one_line, missing_decoder, number_of_frames, quiet
from data_tools.formats.tables import existing_folder
from dsmoe_vl.data.folder_walk import described, files_below
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.files import require_regular

NAME = "dicom"
HELP = "a folder of DICOM files, with a table of captions or texts of their tags; patient data are dropped"
DESCRIPTION = """\
Expected files:

    study/
      chest/0001.dcm       DICOM files, by their content and not by their names
      captions.csv         file,text                          or tsv, jsonl, parquet; or a .json,
                           chest/0001.dcm,no effusion         {"chest/0001.dcm": "no effusion"}

A picture becomes a PNG of 8 bits, as the file wants it shown: modality LUT or rescale, VOI LUT or window, palette,
MONOCHROME1 inverted. --window shows other values, such as -600 1500 for lungs. Several frames become a video without
loss. Without --captions, --text-tags says of which tags the caption is made.

Of the tags, KEY.json gets Modality, BodyPartExamined, Laterality, ImageLaterality and ViewPosition, and nothing else.
Identifiers are the paths below the folder. A file is rejected if its path or caption has its PatientName, PatientID,
another number or date of it, or if a tag says that its pixels identify the patient. Read docs/domains.md.

Example:

    python -m data_tools.convert dicom --images study --captions study/captions.csv --output shards/study
"""

KEPT = ("Modality", "BodyPartExamined", "Laterality", "ImageLaterality", "ViewPosition")  # in KEY.json
TEXT_TAGS = (
    *KEPT, "StudyDescription", "SeriesDescription", "ProtocolName", "RequestedProcedureDescription",
    "PerformedProcedureStepDescription", "AcquisitionProtocolName", "ContrastBolusAgent", "ScanningSequence",
    "SequenceName", "ImageComments",
)  # fmt: skip
_SHOWS_PATIENT = ("BurnedInAnnotation", "RecognizableVisualFeatures")
_PERSONAL = (
    "PatientID", "OtherPatientIDs", "PatientBirthDate", "AccessionNumber", "StudyDate",
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID",
)  # fmt: skip
_NAMES = ("PatientName", "ReferringPhysicianName")
_NO_NAMES = {"anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "null", "removed", "unnamed"}
_LEAST_PERSONAL = 3  # characters; a shorter value stands in a text or path by chance
_HEADER = [*TEXT_TAGS, *_SHOWS_PATIENT, *_PERSONAL, *_NAMES, "SpecificCharacterSet", "Rows", "NumberOfFrames"]
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")  # a code string; anything else in its place may be a person's words
_MAGIC_AT, _MAGIC = 128, b"DICM"
_OTHER, _NO_PICTURE = "no DICOM file", "DICOM without a picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--images`, `--captions` or `--text-tags`, `--window`, `--ids` and `--identifying-pixels`."""
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the DICOM files")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--captions", type=Path, metavar="FILE", help="captions by path")
    texts.add_argument(
        "--text-tags", nargs="+", choices=TEXT_TAGS, metavar="TAG", help=f"the caption, of {', '.join(TEXT_TAGS)}"
    )
    parser.add_argument(
        "--window", nargs=2, type=float, metavar=("CENTRE", "WIDTH"), help="values shown, in place of the files' own"
    )
    parser.add_argument(
        "--ids", choices=("path", "number"), default="path", help="what names samples (%(default)s); number: in order"
    )
    parser.add_argument(
        "--identifying-pixels",
        action="store_true",
        help=f"use pictures although {' or '.join(_SHOWS_PATIENT)} is YES",
    )


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per DICOM file with a picture, sorted by path; with --captions, of the files that they name.

    Raises DataError if the folder or the table cannot be used, ConfigError for a window without a width or if pydicom
    is missing.
    """
    imported()
    window: tuple[float, float] | None = tuple(arguments.window) if arguments.window else None
    if window and not (math.isfinite(window[0]) and 1 <= window[1] < math.inf):
        raise ConfigError(f"--window {window[0]:g} {window[1]:g}: give a centre, and a width of at least 1")
    folder = existing_folder(arguments.images, "--images")
    captions = CaptionFile(arguments.captions, "--captions") if arguments.captions else None
    arguments.left = []  # for `unused`, which is called when all records are read
    files, passed = files_below(folder)
    number, known = 0, ""
    for path in files:
        if captions and path.resolve() == captions.path.resolve():
            continue
        name = path.relative_to(folder).as_posix()
        known = known or name
        texts = captions.of((name,)) if captions else []
        if captions and not texts:
            passed.append((path, f"without a caption in {captions.path.name}"))
            continue
        header, problem = _header(path)
        reason = problem.partition(":")[0]
        if reason in (_OTHER, _NO_PICTURE) and not captions:
            passed.append((path, reason))
            continue
        identifier = name if arguments.ids == "path" else f"{number:08d}"
        number += 1
        if header is None:
            yield Record(identifier, "image", None, texts, problem=problem)
        else:
            yield _record(identifier, Picture(path, window), header, texts, arguments)
    if captions:
        captions.require_use(known)
        arguments.left.append(captions.unused())
    elif not number:
        raise DataError(
            f"--images {folder}: no DICOM file with a picture is there, but {described(passed, folder) or 'nothing'}"
        )
    arguments.left.append(described(passed, folder))


def unused(arguments: argparse.Namespace) -> str:
    """Files that are no pictures or have no caption, and captions without a file; "" without any."""
    return ", ".join(filter(None, arguments.left))


def _header(path: Path) -> tuple[Any, str]:
    """The tags in _HEADER and the transfer syntax; or None, and why a record cannot be made of the file."""
    try:
        with require_regular(path).open("rb") as file:
            if file.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] != _MAGIC:
                return None, f"{_OTHER}: {path}: {_MAGIC.decode()} is not at byte {_MAGIC_AT}"
        with quiet():
            header = imported().dcmread(path, stop_before_pixels=True, specific_tags=_HEADER)
            for element in header:  # reads the values
                str(element.value)
            number_of_frames(header)
    except OSError as error:
        return None, f"unreadable file: {path}: {error.strerror or in_one_line(error)}"
    except Exception as error:  # pydicom raises anything for malformed files
        return None, f"unreadable header: {path}: {in_one_line(error)}"
    if "Rows" not in header:
        return None, f"{_NO_PICTURE}: {path}: it has no Rows"
    if not header.file_meta.get("TransferSyntaxUID"):
        return None, f"unreadable header: {path}: it has no TransferSyntaxUID"
    return header, ""


def _record(identifier: str, picture: Picture, header: Any, texts: list[Any], arguments: argparse.Namespace) -> Record:
    if arguments.text_tags:
        values = [_text(header.get(tag)) for tag in arguments.text_tags]
        texts = [", ".join(filter(None, values))]
    own = {tag: value for tag in KEPT if _CODE.fullmatch(value := _text(header.get(tag)))}
    said = " ".join(text for text in texts if isinstance(text, str))
    # Pictures of one text are not distinguished by it: they are not used as negatives of each other.
    content = {"content": f"{NAME}: {hashlib.sha256(said.encode('utf-8', 'replace')).hexdigest()[:16]}"} if said else {}
    kind: Any = "video" if number_of_frames(header) > 1 else "image"
    by_path = identifier if arguments.ids == "path" else ""
    missing = missing_decoder(str(header.file_meta.TransferSyntaxUID))
    problem = f"missing decoder: {picture}: {missing}" if missing else ""
    if not arguments.identifying_pixels:
        problem = problem or _identifying_pixels(picture.path, header)
    problem = problem or _patient_data(by_path, said, picture.path, header)
    return Record(identifier, kind, None if problem else picture, texts, {NAME: own, **content}, problem)


def _identifying_pixels(path: Path, header: Any) -> str:
    for tag in _SHOWS_PATIENT:
        if _text(header.get(tag)).upper() == "YES":
            return f"identifying pixels: {path}: {tag} is YES; --identifying-pixels uses it all the same"
    return ""


def _patient_data(identifier: str, said: str, path: Path, header: Any) -> str:
    """The problem if the identifier by path or the caption has a value that names the patient or the examination."""
    for tag in (*_PERSONAL, *_NAMES):
        values = _values(header.get(tag))
        for word in re.split(r"[\s^=,.]+", " ".join(values)) if tag in _NAMES else values:
            if len(word) < _LEAST_PERSONAL or word.casefold() in _NO_NAMES:
                continue
            whole = re.compile(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", re.IGNORECASE)
            if whole.search(identifier):
                return f"patient data in path: {path} has the file's {tag} in it; --ids number names it by a number"
            if whole.search(said):
                return f"patient data in text: the caption of {path} has the file's {tag} in it: take it out there"
    return ""


def _text(value: Any) -> str:
    """The value of a tag in one line; several values with blanks between."""
    return " ".join(_values(value))


def _values(value: Any) -> list[str]:
    """The values of a tag, each in one line."""
    if value is None:
        return []
    several = value if isinstance(value, list) or type(value).__name__ == "MultiValue" else [value]
    return [" ".join(str(one).split()) for one in several]
