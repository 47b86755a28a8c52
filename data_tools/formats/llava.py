"""LLaVA's instruction and pretraining data: one JSON file of conversations about images."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats import Record
from data_tools.formats.identifiers import identifier_text
from data_tools.formats.tables import existing_folder, read_json
from dsmoe_vl.errors import DataError

NAME = "llava"
HELP = "LLaVA conversations (llava_instruct_150k.json, blip_laion_cc_sbu_558k.json and the like)"
DESCRIPTION = """\
Expected files:

    llava/
      blip_laion_cc_sbu_558k.json     [{"id": "004539375", "image": "00453/004539375.jpg", "conversations": [
                                          {"from": "human", "value": "Describe the image.\\n<image>"},
                                          {"from": "gpt", "value": "a mattress on a bed"}, ...]}, ...]
      images/00453/004539375.jpg      DIR/`image`

The first answer becomes the caption; the whole conversation is kept in `conversations`. A conversation of several turns
is for the caption task only. Rows without an image, or with several, are rejected.

Example:

    python -m data_tools.convert llava --images llava/images \\
        --annotations llava/blip_laion_cc_sbu_558k.json --output shards/llava_pretrain
"""

PLACEHOLDER = "<image>"  # marks the place of the image in a conversation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--images` and `--annotations`."""
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="a JSON list of conversations")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per row, in the order of the file.

    Raises DataError if the file is missing or not a list, or the folder is missing.
    """
    path: Path = arguments.annotations
    folder = existing_folder(arguments.images, "--images")
    rows = read_json(path, "--annotations")
    if not isinstance(rows, list):
        raise DataError(
            f"--annotations {path}: not a LLaVA file: a JSON list of rows with image and conversations is expected"
        )
    for number, row in enumerate(rows):
        yield _record(folder, number, row)


def _record(folder: Path, number: int, row: Any) -> Record:
    """The record of row `number`, counted from 0.

    Only the first answer is used as a caption. Later ones answer questions that are not part of a caption ("Yes, two of
    them"). With several turns even the first is often an answer and not a description, so `tasks` leaves out retrieval.
    """
    content = row if isinstance(row, dict) else {}
    # An `id` occurs in many rows: once per conversation about its image.
    name = identifier_text(content.get("id"))
    identifier = f"{number:07d}" if name is None else f"{number:07d}-{name}"
    image = content.get("image")
    names = image if isinstance(image, list) else [image] if image else []
    turns = content.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        problem = f"malformed row: number {number} has no list `conversations` of objects"
    elif not names:
        problem = f"no image: row {number} is text only"
    elif len(names) > 1:
        problem = f"several images: row {number} has {len(names)}"
    elif not isinstance(names[0], str):
        problem = f"malformed row: the image of number {number} is {names[0]!r}"
    else:
        answers = [turn.get("value") for turn in turns if turn.get("from") == "gpt"]
        captions = [text.replace(PLACEHOLDER, " ") if isinstance(text, str) else text for text in answers[:1]]
        meta = {"conversations": turns, **({"tasks": ["caption"]} if len(answers) > 1 else {})}
        return Record(identifier, "image", folder / names[0], captions, meta)
    return Record(identifier, "image", None, [], problem=problem)
