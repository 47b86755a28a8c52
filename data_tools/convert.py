"""Convert a raw dataset to shards: plain WebDataset tars with the original bytes, and an `index.json`.

Records that cannot be used are skipped, counted by reason and listed in rejected.jsonl in the output folder. What was
done to others, such as damaged metadata that were ignored or a GIF that became a PNG, is listed in notes.jsonl. Repeat
an interrupted command to continue it. On several hosts with a common file system:
mpirun -np N python -m data_tools.convert ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data_tools.check import Reencoding
from data_tools.formats import (
    Record,
    activitynet,
    coco,
    dicom,
    flickr,
    folder,
    img2dataset,
    karpathy,
    llava,
    msrvtt,
    msvd,
    pdf,
    qvhighlights,
    recordio,
    summe,
    tvsum,
    vatex,
    videolist,
    videoxum,
    webvid,
)
from data_tools.parallel import default_workers
from data_tools.parts import Outcome, Parts, Settings, make_part
from data_tools.workforce import Hosts, work
from dsmoe_vl.command import run
from dsmoe_vl.console import printable, tell
from dsmoe_vl.errors import DataError

FORMATS = (
    folder, coco, karpathy, flickr, llava, img2dataset,
    msrvtt, msvd, vatex, webvid, activitynet, videoxum, tvsum, summe, qvhighlights,
    recordio, videolist, dicom, pdf,
)  # fmt: skip


def convert(
    records: Iterable[Record],
    output: Path,
    settings: Settings,
    max_rejected: float = 0.1,
    workers: int = 1,
    hosts: Hosts | None = None,
) -> Outcome:
    """Check `records` and write the usable ones to the shard folder `output`, in order.

    The output does not depend on `workers` (processes) or `hosts`. Collective over `hosts`.

    Args:
        max_rejected: fraction of records that may be rejected; above it no shards are written.

    Raises:
        DataError: too many records rejected, a folder with other shards, an identifier that occurs twice.
    """
    if not 0.0 <= max_rejected <= 1.0:
        raise DataError(f"--max-rejected {max_rejected}: give a fraction between 0 and 1")
    hosts = hosts or Hosts()
    parts = Parts(output, settings)
    missing = hosts.share(hosts.once(lambda: parts.open(records)))
    total, quiet = sum(part.size for part in missing), True if hosts.rank else None
    with hosts.together(), tqdm(total=total, desc=printable(str(output)), unit="record", disable=quiet) as bar:
        work(make_part, [(part, settings) for part in missing], workers, bar.update)
    return hosts.once(partial(parts.publish, max_rejected))


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    formats = parser.add_subparsers(title="formats", dest="format", required=True, metavar="FORMAT")
    for module in FORMATS:
        options = formats.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(options)
        _add_common(options.add_argument_group("shards"))
        options.set_defaults(records=module.records, unused=getattr(module, "unused", lambda _: ""))
    given = parser.parse_args(arguments)

    def command() -> int:
        hosts = Hosts()
        settings = Settings(
            given.format,
            given.split,
            given.samples_per_shard,
            given.mib_per_shard * 2**20,
            Reencoding(given.max_side, given.quality),
        )
        workers = given.workers or (default_workers() if hosts.count == 1 else 1)
        outcome = convert(given.records(given), given.output, settings, given.max_rejected, workers, hosts)
        if hosts.rank == 0:
            tell(f"wrote {outcome.written} samples to {given.output}; rejected: {outcome.summary()}")
            if outcome.reasons:
                tell(f"rejected records are listed in {outcome.listing}")
            if unused := given.unused(given):
                tell(f"not used: {unused}")
            if outcome.notes:
                tell(f"notes: {outcome.notes_summary()}; listed in {outcome.noted}")
        return 0

    return run(command)


def _add_common(options: argparse._ArgumentGroup) -> None:
    options.add_argument("--output", type=Path, required=True, metavar="SHARDS", help="folder without shards; created")
    options.add_argument("--split", default="train", metavar="NAME", help="begins the names of shards (%(default)s)")
    options.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="at most (%(default)s)")
    options.add_argument("--mib-per-shard", type=int, default=256, metavar="N", help="about, at most (%(default)s)")
    options.add_argument("--max-side", type=int, default=0, metavar="PIXELS", help="scale larger images down to this")
    options.add_argument("--quality", type=int, default=0, metavar="Q", help="write every image as a JPEG, 1 to 100")
    options.add_argument(
        "--max-rejected",
        type=float,
        default=0.1,
        metavar="F",
        help="fraction of records that may be skipped (%(default)s)",
    )
    options.add_argument("--workers", type=int, default=0, metavar="N", help="processes (one per core, up to 8)")


if __name__ == "__main__":
    sys.exit(main())
