"""The command line of `launch/doctor.py`."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse(root: Path) -> argparse.Namespace:
    """The arguments. `root`: of the repository, for the defaults."""
    parser = argparse.ArgumentParser(description="Examine a recipe, or a cluster before a run.", allow_abbrev=False)
    parser.add_argument("subject", choices=["objective", "lr", "weights", "cluster"])
    parser.add_argument("--recipe", type=Path, default=root / "launch/recipes/three_tasks.toml", metavar="TOML")
    parser.add_argument("--deepspeed", type=Path, default=root / "ds_configs/moe.json", metavar="JSON")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # makes this process one rank of the grid
    race = parser.add_argument_group("lr and weights")
    race.add_argument(
        "--rates", type=_numbers, metavar="LR,LR", help="lr alone, with commas; default: an eighth to twice the JSON's"
    )
    race.add_argument(
        "--steps", type=int, help="optimizer steps at each rate, or before gradients are measured; default: 60"
    )
    race.add_argument("--world-size", type=int, help="with the batch of this many ranks; default: 1")
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--hostfile", type=Path, metavar="FILE", help="check it, and without a launcher ask its hosts")
    # In processes that a doctor starts over ssh.
    cluster.add_argument("--part", choices=["facts", "links"], default="", help=argparse.SUPPRESS)
    cluster.add_argument("--name", default="", help=argparse.SUPPRESS)
    cluster.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by some launchers
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_intermixed_args()
    if args.subject != "lr" and args.rates:
        parser.error("--rates belong to lr")
    if args.subject not in ("lr", "weights") and (args.steps is not None or args.world_size is not None):
        parser.error("--steps and --world-size belong to lr and weights")
    if args.subject != "cluster" and args.hostfile is not None:
        parser.error("--hostfile belongs to cluster")
    return args


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give numbers with commas between them, such as 3e-4,6e-4") from None
