"""Train: `deepspeed launch/train.py --deepspeed ds_configs/moe.json [--recipe FILE] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Torch reads it when imported. Without it, every rank prints a C++ stack when another rank closes its connection.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe_vl.command import leave, print_error, steady_output
from dsmoe_vl.errors import as_user_error
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.training.signals import StopRequest
from dsmoe_vl.training.start import Request, first_words, is_supervised, missing_files, plan_run, supervise, train

_ROOT = Path(__file__).resolve().parent.parent
_DEFAULT_RECIPE = _ROOT / "launch" / "recipes" / "quickstart.toml"
_DEFAULT_DEEPSPEED = _ROOT / "ds_configs" / "moe.json"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a sparse vision-language model.", allow_abbrev=False)
    parser.add_argument("--deepspeed", "--deepspeed_config", type=Path, default=_DEFAULT_DEEPSPEED, metavar="JSON")
    parser.add_argument("--recipe", type=Path, default=_DEFAULT_RECIPE, metavar="TOML")
    parser.add_argument("--run-dir", type=Path, help="run directory; overrides run.directory and run.name")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and exit")
    parser.add_argument("--world-size", type=int, help="with --dry-run: plan for this many ranks")
    parser.add_argument("--fresh", action="store_true", help="begin anew; a run in the directory is kept beside it")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="start again up to N times without a new checkpoint"
    )
    parser.add_argument("--strict", action="store_true", help="fail if the plan would differ from the request")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by some launchers
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_intermixed_args()
    if args.world_size is not None and not args.dry_run:
        parser.error("--world-size needs --dry-run: otherwise the launcher sets the number of ranks")
    if args.max_restarts < 0:
        parser.error(f"--max-restarts {args.max_restarts}: must be at least 0")
    return args


def main() -> int:
    """Exit status: 0 if trained or stopped on request, 2 for a user's error."""
    stop = StopRequest()  # before the slow imports, because the launcher may be killed during them
    args = parse()
    with steady_output():
        return plan_and_train(args, stop)


def plan_and_train(args: argparse.Namespace, stop: StopRequest) -> int:
    """The exit status of a rank. After an error on one rank, every rank ends."""
    ranks = Ranks(0, 1, 0)
    try:
        ranks = Ranks.discover()
        request = Request(args.recipe, args.deepspeed, args.overrides, args.run_dir, args.strict)
        if args.max_restarts and not args.dry_run and not is_supervised():
            return supervise(request, ranks, stop, args.max_restarts, [sys.executable, *sys.argv])
        plan = plan_run(request, ranks.world_size if args.world_size is None else args.world_size)
        if args.dry_run:
            if ranks.rank == 0:
                show(plan)
            return 0
    except Exception as error:
        known = as_user_error(error)
        if known is None:
            raise
        if ranks.rank == 0:
            print_error(str(known))
        return 2
    try:
        make_data = None
        if args.recipe.resolve() == _DEFAULT_RECIPE:
            from data_tools.synthetic.default_data import make_default_data as make_data  # type: ignore[assignment]
        with stop:
            train(plan, ranks, stop, make_data, args.fresh)
    except BaseException as error:
        from dsmoe_vl.parallel.process_group import end_rank

        end_rank(error, ranks)
    return 0


def show(plan: RunPlan) -> None:
    """Print the plan, and the files missing on this machine. Raises ConfigError."""
    print(describe(plan))
    if words := first_words(plan):
        print(words)
    for name in missing_files(plan):
        print(f"not here yet: {name}")


if __name__ == "__main__":
    leave(main())
