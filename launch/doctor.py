"""Examine a recipe: `python launch/doctor.py objective --recipe FILE [section.key=value ...]`.

`objective` runs the recipe on its own data with a small model, split in many ways over ranks, expert parallelism, ZeRO
stages, accumulation and packing order, and compares every loss term and gradient with one rank. It also checks for
faults that raise no error. Takes some minutes on the CPU, in two processes. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Torch and DeepSpeed read these when they are imported.
os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe_vl.command import print_error, run
from dsmoe_vl.doctor.objective import examine, report, run_splits

_ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Examine a recipe.", allow_abbrev=False)
    parser.add_argument("subject", choices=["objective"])
    parser.add_argument("--recipe", type=Path, default=_ROOT / "launch/recipes/three_tasks.toml", metavar="TOML")
    parser.add_argument("--deepspeed", type=Path, default=_ROOT / "ds_configs/moe.json", metavar="JSON")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # makes this process one rank of the grid
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    return parser.parse_intermixed_args()


def main() -> int:
    """Exit status: 0 if all checks passed, 1 if not, 2 for a user's error."""
    args = parse()
    if args.results is None:
        return run(start_splits)
    return run(lambda: examine_split(args), print_error if os.environ["RANK"] == "0" else lambda error: None)


def examine_split(args: argparse.Namespace) -> int:
    """Be one rank of the grid. Returns the exit status. Raises DsmoeVlError."""
    examine(args.recipe, args.deepspeed, args.overrides, args.results)
    return 0


def start_splits() -> int:
    """Run all splits, and print what was found. Returns the exit status."""
    status, lines = run_splits(sys.argv)
    return status or (0 if report(lines) else 1)


if __name__ == "__main__":
    sys.exit(main())
