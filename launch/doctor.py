"""Examine a recipe: `python launch/doctor.py objective|lr --recipe FILE [section.key=value ...]`.

`objective` runs the recipe on its own data with a small model, split in many ways over ranks, expert parallelism, ZeRO
stages, accumulation and packing order, and compares every loss term and gradient with one rank. It also checks for
faults that raise no error. Takes some minutes on the CPU, in two processes. Exit status 1 if a check fails.

`lr` trains the recipe's real model for some steps at several learning rates, on the GPU if there is one, compares the
held-out losses and suggests `optimizer.params.lr`. Exit status 1 if every rate diverges.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Torch reads it when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe_vl.command import leave, print_error, run

_ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Examine a recipe.", allow_abbrev=False)
    parser.add_argument("subject", choices=["objective", "lr"])
    parser.add_argument("--recipe", type=Path, default=_ROOT / "launch/recipes/three_tasks.toml", metavar="TOML")
    parser.add_argument("--deepspeed", type=Path, default=_ROOT / "ds_configs/moe.json", metavar="JSON")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # makes this process one rank of the grid
    race = parser.add_argument_group("lr")
    race.add_argument(
        "--rates", type=_numbers, metavar="LR,LR", help="with commas; default: an eighth to twice the JSON's lr"
    )
    race.add_argument("--steps", type=int, help="optimizer steps at each rate; default: 60")
    race.add_argument("--world-size", type=int, help="with the batch of this many ranks; default: 1")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_intermixed_args()
    if args.subject != "lr" and (args.rates or args.steps is not None or args.world_size is not None):
        parser.error("--rates, --steps and --world-size belong to lr")
    return args


def main() -> int:
    """Exit status: 0 if all checks passed or a rate is suggested, 1 if not, 2 for a user's error."""
    args = parse()
    if args.subject == "lr":
        return run(lambda: race_rates(args))
    # Torch and DeepSpeed read these when they are imported.
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if args.results is None:
        return run(start_splits)
    return run(lambda: examine_split(args), print_error if os.environ["RANK"] == "0" else lambda error: None)


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give numbers with commas between them, such as 3e-4,6e-4") from None


def race_rates(args: argparse.Namespace) -> int:
    """Race learning rates. Returns the exit status. Raises DsmoeVlError."""
    from dsmoe_vl.parallel.device import device_name

    device_name()  # sets what DeepSpeed reads when it is imported
    from dsmoe_vl.doctor.learning_rate import STEPS, find_rate

    steps = STEPS if args.steps is None else args.steps
    world_size = 1 if args.world_size is None else args.world_size
    return find_rate(args.recipe, args.deepspeed, args.overrides, args.rates or [], steps, world_size)


def examine_split(args: argparse.Namespace) -> int:
    """Be one rank of the grid. Returns the exit status. Raises DsmoeVlError."""
    from dsmoe_vl.doctor.objective import examine

    examine(args.recipe, args.deepspeed, args.overrides, args.results)
    return 0


def start_splits() -> int:
    """Run all splits, and print what was found. Returns the exit status."""
    from dsmoe_vl.doctor.objective import report, run_splits

    status, lines = run_splits(sys.argv)
    return status or (0 if report(lines) else 1)


if __name__ == "__main__":
    leave(main())
