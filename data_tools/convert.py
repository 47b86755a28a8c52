"""Turn a raw dataset into shards: plain WebDataset tars with the original bytes, and an `index.json` beside them.

Records that cannot be used are skipped, counted by reason and listed in rejected.jsonl in the output folder.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
from PIL import Image
from tqdm import tqdm

from data_tools.command import run
from data_tools.formats import Record, coco, video_folder
from data_tools.parallel import default_workers, ordered_map
from data_tools.writer import Rejects, ShardWriter
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.data.shards import VIDEO_EXTENSIONS
from dsmoe_vl.errors import DataError

FORMATS = (coco, video_folder)
IMAGE_TYPES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's format -> extension
CHECKED_FRAMES = 16  # of a video are decoded to see whether it is whole


@dataclass(frozen=True)
class Checked:
    """A record that can be trained on: its bytes, their type, clean captions, and all of KEY.json's values."""

    identifier: str
    media: bytes
    media_type: str
    captions: list[str]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """A record that cannot, and why."""

    identifier: str
    reason: str
    detail: str


def convert(
    records: Iterable[Record],
    source: str,
    output: Path,
    split: str = "train",
    samples_per_shard: int = 1000,
    max_rejected: float = 0.1,
    workers: int = 1,
) -> tuple[int, Rejects]:
    """Check `records` and write those that can be used into the shard folder `output`, in their order.

    Args:
        source: name of the dataset, noted in every KEY.json.
        max_rejected: fraction of records that may be skipped; with more, no shard is left behind.
        workers: threads that read and decode; they do not change the output.

    Returns:
        The number of samples written, and what was skipped.

    Raises:
        DataError: too many records rejected, a folder that holds shards already, an identifier that occurs twice.
    """
    with ShardWriter(output, split, samples_per_shard) as writer:
        rejects = Rejects(output, max_rejected)
        outcomes = ordered_map(partial(check, source=source), records, workers)
        for outcome in tqdm(outcomes, desc=str(output), unit="record", disable=None):
            if isinstance(outcome, Rejected):
                rejects.add(outcome.identifier, outcome.reason, outcome.detail)
            else:
                meta = outcome.meta
                writer.write(outcome.identifier, outcome.media, outcome.media_type, outcome.captions[0], meta)
        rejects.check(writer.samples)
    return writer.samples, rejects


def check(record: Record, source: str) -> Checked | Rejected:
    """Read and decode one record's media, exactly as training will, and clean its captions."""
    captions = [" ".join(caption.split()) for caption in record.captions if isinstance(caption, str)]
    captions = [caption for caption in captions if caption]
    if not captions:
        return Rejected(record.identifier, "empty caption", f"{len(record.captions)} captions, none with text")
    if record.media is None:
        return Rejected(record.identifier, "unlisted file", "the annotations caption it but name no file")
    try:
        data = record.media.read_bytes()
    except FileNotFoundError:
        return Rejected(record.identifier, "missing file", str(record.media))
    except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
        return Rejected(record.identifier, "unreadable file", f"{record.media}: {error}")
    try:
        media_type, facts = image_facts(data) if record.kind == "image" else video_facts(data, record.media.suffix)
    except DataError as error:
        return Rejected(record.identifier, f"unreadable {record.kind}", f"{record.media}: {error}")
    meta = {"source": source, "id": record.identifier, "tasks": ["caption", "retrieval"], "captions": captions}
    return Checked(record.identifier, data, media_type, captions, {**record.meta, **facts, **meta})


def image_facts(data: bytes) -> tuple[str, dict[str, Any]]:
    """Extension by content, and width and height of the upright picture. Raises DataError where it does not decode."""
    picture = decode_image(data)
    with Image.open(io.BytesIO(data)) as opened:
        media_type = IMAGE_TYPES[opened.format or ""]
    return media_type, {"width": picture.width, "height": picture.height}


def video_facts(data: bytes, suffix: str) -> tuple[str, dict[str, Any]]:
    """Extension, width, height, fps and duration_seconds. Raises DataError where frames do not decode.

    The times come from the packets: several containers leave frame count and duration out of their headers.
    """
    media_type = suffix.lower().removeprefix(".")
    if media_type not in VIDEO_EXTENSIONS:
        raise DataError(f"a {suffix or 'nameless'} file; {', '.join(VIDEO_EXTENSIONS)} are read")
    picture = decode_video(data, CHECKED_FRAMES)[0][1]
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        tick_seconds = float(stream.time_base or 0)
        times = sorted(
            ticks * tick_seconds
            for packet in container.demux(stream)
            if packet.size and (ticks := packet.dts if packet.pts is None else packet.pts) is not None
        )
        rate = float(stream.average_rate or 0)
    span = times[-1] - times[0]
    rate = rate or ((len(times) - 1) / span if span else 0.0)
    facts = {
        "width": picture.width,
        "height": picture.height,
        "fps": round(rate, 3) or None,
        "duration_seconds": round(span + 1 / rate, 3) if rate else None,
    }
    return media_type, facts


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.convert", description=__doc__)
    formats = parser.add_subparsers(title="formats", dest="format", required=True, metavar="FORMAT")
    for module in FORMATS:
        options = formats.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(options)
        options.add_argument("--output", type=Path, required=True, metavar="SHARDS", help="folder; must hold no shards")
        options.add_argument("--split", default="train", metavar="NAME", help="names the shards (%(default)s)")
        options.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="at most (%(default)s)")
        options.add_argument(
            "--max-rejected", type=float, default=0.1, metavar="F", help="fraction that may be skipped (%(default)s)"
        )
        options.set_defaults(records=module.records)
    given = parser.parse_args(arguments)

    def command() -> int:
        written, rejects = convert(
            given.records(given),
            given.format,
            given.output,
            given.split,
            given.samples_per_shard,
            given.max_rejected,
            default_workers(),
        )
        print(f"wrote {written} samples to {given.output}; rejected: {rejects.summary()}")
        if rejects.reasons:
            print(f"rejected records are listed in {rejects.path}")
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
