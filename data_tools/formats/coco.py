"""COCO Captions: one JSON file of images and captions beside a folder of photos."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record
from data_tools.formats.identifiers import Unique, identifier, identifier_text
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

NAME = "coco"
HELP = "COCO Captions (captions_train2017.json and the like)"
DESCRIPTION = """\
Expected files:

    coco/
      annotations/captions_train2017.json     {"images":      [{"id": 790, "file_name": "000000000790.jpg", ...}, ...],
                                                "annotations": [{"image_id": 790, "caption": "A dog ...", ...}, ...]}
      train2017/000000000790.jpg               one file per image, named by `file_name`

Example:

    python -m data_tools.convert coco --images coco/train2017 \\
        --annotations coco/annotations/captions_train2017.json --output shards/coco_train
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--images` and `--annotations`."""
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the photos")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="captions_*.json")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per image, in the order of `images`, then those that occur in `annotations` only.

    Raises DataError if the file is missing or not a COCO caption file, or the folder is missing.
    """
    path: Path = arguments.annotations
    if not arguments.images.is_dir():
        raise DataError(f"--images {arguments.images}: no such folder")
    content = _read(path)
    captions: dict[str, list[Any]] = defaultdict(list)
    unique = Unique()
    try:
        licences = {identifier_text(row["id"]): row["url"] for row in content.get("licenses", [])}
        for number, row in enumerate(content["annotations"]):
            captions[identifier(row["image_id"], f"{path}, annotations[{number}]")].append(row["caption"])
        listed = []
        for number, row in enumerate(content["images"]):
            place = f"{path}, images[{number}]"
            listed.append((unique.add(identifier(row["id"], place), place), str(row["file_name"]), row))
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a COCO caption file ({error!r}): `images` needs id and file_name, `annotations` image_id and "
            "caption; instances_*.json and person_keypoints_*.json have no captions"
        ) from error
    for image, name, row in listed:
        licence = licences.get(identifier_text(row.get("license")))
        meta = {"url": row.get("flickr_url") or row.get("coco_url"), "licence": licence}
        yield Record(image, "image", arguments.images / name, captions.get(image, []), meta)
    for image in sorted(captions.keys() - {image for image, *_ in listed}):
        yield Record(image, "image", None, captions[image])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(require_regular(path).read_bytes())
    except OSError as error:
        raise DataError(f"--annotations {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"--annotations {path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"--annotations {path}: not a COCO caption file: a JSON object is expected")
    return content
