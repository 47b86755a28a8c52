"""Export a trained model: `python launch/export.py --run runs/NAME --output DIR`.

Writes the weights, tokenizer and plan of the newest checkpoint to DIR, which the other programs accept as `--run DIR`.
Experts that the L1 term has reduced to zero output are left out; the model's outputs do not change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsmoe_vl.checkpoint.export import export_run
from dsmoe_vl.command import run


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Export a trained model for use.")
    parser.add_argument("--run", type=Path, required=True, help="a run directory, such as runs/quickstart")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    return parser.parse_args()


def main() -> int:
    """Print the dropped experts and the sizes. Exit status 2 if the run or the folder cannot be used."""
    args = parse()
    return run(lambda: export(args.run, args.output))


def export(run_dir: Path, output: Path) -> int:
    """Export, and print a summary. Returns the exit status. Raises DsmoeVlError."""
    done = export_run(run_dir, output)
    print(f"{done.checkpoint}")
    for layer in done.layers:
        print(f"  layer {layer.layer}: {layer.dropped} of {layer.experts} experts are null and dropped")
    print(f"  weights: {done.before_bytes:,} bytes before, {done.after_bytes:,} bytes after")
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
