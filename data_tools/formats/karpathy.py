"""Karpathy's splits of COCO, Flickr8k and Flickr30k: one JSON file of images, captions and parts."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record
from data_tools.formats.tables import existing_folder, read_json
from dsmoe_vl.errors import DataError

NAME = "karpathy"
HELP = "Karpathy's splits of COCO, Flickr8k and Flickr30k (dataset_coco.json and the like)"
DESCRIPTION = """\
Expected files:

    coco/
      dataset_coco.json                          {"images": [{"filepath": "val2014", "imgid": 0, "split": "test",
                                                    "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
                                                    "sentences": [{"raw": "A man ...", ...}, ...]}, ...]}
      val2014/COCO_val2014_000000391895.jpg      `filepath`/`filename`; those of Flickr have no `filepath`
      train2014/...

The captions of UCM, Sydney and RSICD, pictures from above, have this form too.

`--part train` includes the images of `restval`, as in published results: 113,287 of COCO.

Examples:

    python -m data_tools.convert karpathy --images coco --annotations coco/dataset_coco.json --part test \\
        --output shards/coco_test --split test
    python -m data_tools.convert karpathy --images flickr30k-images --annotations dataset_flickr30k.json --part train \\
        --output shards/flickr30k_train
"""

# `restval`: COCO's validation images that are neither in `val` nor in `test`.
PARTS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--images`, `--annotations` and `--part`."""
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder with train2014, or of the photos"
    )
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="dataset_*.json")
    parser.add_argument("--part", choices=PARTS, required=True, help="which images; train includes restval")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per image of the part, in the order of the file.

    Raises DataError if the file is missing or malformed, the folder is missing, or the part is empty.
    """
    path: Path = arguments.annotations
    folder = existing_folder(arguments.images, "--images")
    content = read_json(path, "--annotations")
    try:
        images = [_record(folder, row) for row in content["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--annotations {path}: not a file of Karpathy's splits ({error!r}): `images` needs filename, split and "
            "sentences with raw; give dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json"
        ) from error
    wanted = [record for split, record in images if split in PARTS[arguments.part]]
    if not wanted:
        sizes = Counter(split for split, _ in images)
        known = ", ".join(f"{count} images of {split}" for split, count in sizes.items()) or "no images"
        raise DataError(f"--part {arguments.part}: {path} has none of it, but {known}")
    yield from wanted


def _record(folder: Path, row: dict[str, Any]) -> tuple[str, Record]:
    """The split and the record of one image.

    The stem of the file name is the identifier. It is unique: in COCO it includes the folder.
    """
    name = Path(row["filename"])
    captions = [sentence["raw"] for sentence in row["sentences"]]
    meta = {"cocoid": row["cocoid"]} if "cocoid" in row else {}
    return str(row["split"]), Record(name.stem, "image", folder / (row.get("filepath") or "") / name, captions, meta)
