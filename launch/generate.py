"""Use a trained model: `python launch/generate.py caption --run runs/NAME --image FILE... [--video FILE...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsmoe_vl.data.segment import Sample
from dsmoe_vl.errors import DataError, DsmoeVlError
from dsmoe_vl.inference.generate import caption
from dsmoe_vl.inference.load import load_run


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Use a trained model.")
    commands = parser.add_subparsers(dest="command", required=True)
    captions = commands.add_parser("caption", help="describe images and videos")
    captions.add_argument("--run", type=Path, required=True, help="a run directory, such as runs/quickstart")
    captions.add_argument("--image", type=Path, nargs="+", default=[], metavar="FILE")
    captions.add_argument("--video", type=Path, nargs="+", default=[], metavar="FILE")
    captions.add_argument("--max-tokens", type=int, default=64, help="tokens of a caption at most")
    captions.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    args = parser.parse_args()
    if not args.image and not args.video:
        captions.error("name at least one file with --image or --video")
    if args.max_tokens < 1:
        captions.error(f"--max-tokens {args.max_tokens}: must be at least 1")
    return args


def read(path: Path, media_type: str) -> Sample:
    """A user's own file as a sample. Raises DataError where it cannot be read."""
    try:
        media = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name an existing file") from None
    return Sample(key=path.name, source="", epoch=0, media=media, media_type=media_type, text="", meta={})


def main() -> int:
    """Print `FILE<TAB>caption` a line. Exit status 2 where a file or the run cannot be used; the others still run."""
    args = parse()
    status = 0
    try:
        trained = load_run(args.run, args.device)
    except DsmoeVlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, media_type in [*((p, "jpg") for p in args.image), *((p, "mp4") for p in args.video)]:
        try:
            print(f"{path}\t{caption(trained, [read(path, media_type)], args.max_tokens)[0]}", flush=True)
        except DsmoeVlError as error:
            message = str(error)
            print(f"error: {message if str(path) in message else f'{path}: {message}'}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
