"""Plan a run on a cluster: `python launch/plan.py --recipe R --deepspeed D --gpus 1024 --gpu h200 [--search]`.

Prints memory, step time and the whole run, estimated from figures of the cluster (launch/clusters/, docs/scaling.md).
With --search it tries all ZeRO stages, expert parallel sizes, micro-batches, recomputation and offloading, prints the
best few with reasons, and --write writes the best as a DeepSpeed JSON. --calibrate FILE measures this machine's CPU
instead, and writes a cluster file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dsmoe_vl.command import run
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import write_atomically
from dsmoe_vl.planner.cluster import SHIPPED, cluster_of, load_cluster
from dsmoe_vl.planner.forecast import describe_forecast, forecast
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.search import describe_search, search, with_packs

_ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Plan a run on a cluster.", allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, default=_ROOT / "launch/recipes/base.toml", metavar="TOML")
    parser.add_argument("--deepspeed", type=Path, default=_ROOT / "ds_configs/moe.json", metavar="JSON")
    parser.add_argument("--gpus", type=int, default=8, help="ranks, one for each accelerator")
    where = parser.add_mutually_exclusive_group()
    names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))
    where.add_argument("--gpu", default="h200", help=f"a file of launch/clusters/: {names}")
    where.add_argument("--cluster", type=Path, metavar="TOML", help="another cluster file")
    parser.add_argument("--tokens", type=float, help="budget, padding included; default: that of run.steps")
    parser.add_argument("--packs", type=int, help="packs per optimizer step, over all ranks; default: the JSON's")
    parser.add_argument("--search", action="store_true", help="find the fastest settings that fit")
    parser.add_argument("--write", type=Path, metavar="JSON", help="with --search: write the best as a DeepSpeed JSON")
    parser.add_argument(
        "--calibrate", type=Path, metavar="TOML", help="measure this machine and write its cluster file"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_intermixed_args()
    if args.write and not args.search:
        parser.error("--write needs --search")
    return args


def main() -> int:
    """Exit status: 0 if the plan fits, 1 if it does not, 2 for a user's error."""
    args = parse()
    return run(lambda: calibrate(args) if args.calibrate else plan(args))


def plan(args: argparse.Namespace) -> int:
    """Print the forecast, or the best of all. Returns the exit status. Raises DsmoeVlError."""
    cluster = load_cluster(args.cluster) if args.cluster else cluster_of(args.gpu)
    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: give at least 1")
    if args.tokens is not None and not 0 < args.tokens < 1e18:
        raise ConfigError(f"--tokens {args.tokens:g}: give a number above 0, such as 1e12")
    recipe, deepspeed = load_recipe(args.recipe, args.overrides), load_deepspeed(args.deepspeed)
    if args.packs is not None:
        deepspeed = with_packs(deepspeed, args.packs, args.gpus)
    planned = resolve(
        recipe, deepspeed, args.gpus, device=cluster.device, bf16_unit=cluster.device == "cuda",
        recipe_file=str(args.recipe), deepspeed_file=str(args.deepspeed),
    )  # fmt: skip
    found = forecast(planned, cluster, args.tokens)
    if args.search:
        ranked = search(planned, cluster, args.tokens)
        print(describe_search(planned, cluster, ranked), end="\n\n")
        best, found = ranked[0]
        if args.write:
            write_atomically(args.write, json.dumps(best.settings(deepspeed), indent=2) + "\n")
            print(f'wrote {args.write}; it goes with run.recompute = "{best.recompute}" in the recipe\n')
    print(describe_forecast(found))
    for note in planned.notes if not args.search else ():
        print(f"note: {note}")
    return 0 if found.fits else 1


def calibrate(args: argparse.Namespace) -> int:
    """Measure this machine. Returns the exit status. Raises DsmoeVlError."""
    from dsmoe_vl.doctor.calibration import measure_cluster

    write_atomically(args.calibrate, measure_cluster())
    print(f"wrote {args.calibrate}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
