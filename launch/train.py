"""Train: `deepspeed launch/train.py --deepspeed ds_configs/moe.json [--recipe FILE] [section.key=value ...]`.

Parsing and wiring only. Every check that needs no model runs before a process group exists, on every rank alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# Torch reads it when imported. Without it every rank prints a C++ stack for a connection that another one has closed.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.parallel.device import device_name, has_bf16_unit
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.plan import RunPlan, changed_settings, plan_to_json
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.training.signals import StopRequest

_ROOT = Path(__file__).resolve().parent.parent
_DEFAULT_RECIPE = _ROOT / "launch" / "recipes" / "quickstart.toml"
_DEFAULT_DEEPSPEED = _ROOT / "ds_configs" / "moe.json"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a sparse vision-language model.", allow_abbrev=False)
    parser.add_argument("--deepspeed", "--deepspeed_config", type=Path, default=_DEFAULT_DEEPSPEED, metavar="JSON")
    parser.add_argument("--recipe", type=Path, default=_DEFAULT_RECIPE, metavar="TOML")
    parser.add_argument("--run-dir", type=Path, help="where the run is kept; overrides run.directory and run.name")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and exit")
    parser.add_argument("--world-size", type=int, help="with --dry-run: plan for this many ranks")
    parser.add_argument("--strict", action="store_true", help="fail where the plan would differ from what is asked for")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_args()
    if args.world_size is not None and not args.dry_run:
        parser.error("--world-size is for --dry-run: the launcher decides how many ranks there are")
    return args


def plan_run(args: argparse.Namespace, world_size: int) -> RunPlan:
    """The resolved plan. Raises ConfigError."""
    recipe = load_recipe(args.recipe, args.overrides)
    if args.run_dir is not None:
        run = replace(recipe.run, directory=str(args.run_dir.parent), name=args.run_dir.name)
        recipe = replace(recipe, run=run)
    device = device_name()
    return resolve(
        recipe,
        load_deepspeed(args.deepspeed),
        world_size,
        device=device,
        bf16_unit=has_bf16_unit(device),
        strict=args.strict,
        recipe_file=f"{args.recipe} with the command line's settings" if args.overrides else str(args.recipe),
        deepspeed_file=str(args.deepspeed),
    )


def main() -> int:
    """Exit status: 0 trained or stopped on request, 2 a user's error."""
    stop = StopRequest()  # before the slow imports: the launcher may be killed meanwhile
    args = parse()
    ranks = Ranks(0, 1, 0)
    try:
        ranks = Ranks.discover()
        plan = plan_run(args, ranks.world_size if args.world_size is None else args.world_size)
        if args.dry_run:
            if ranks.rank == 0:
                print(describe(plan))
                for name in missing_files(plan):
                    print(f"not here yet: {name}")
            return 0
    except DsmoeVlError as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train(plan, ranks, stop, uses_default_data=args.recipe.resolve() == _DEFAULT_RECIPE)
    except BaseException as error:
        from dsmoe_vl.parallel.launch import report_failure

        report_failure(error, ranks)
        # Other ranks may wait in a collective for this one: end at once, so that they and the launcher see it.
        os._exit(2 if isinstance(error, DsmoeVlError) else 1)
    return 0


def train(plan: RunPlan, ranks: Ranks, stop: StopRequest, uses_default_data: bool) -> None:
    """Start the process group and run the trainer."""
    quiet_deepspeed(ranks.rank)
    from dsmoe_vl.parallel.launch import HostGroup, start_process_group

    start_process_group(ranks, plan.device)
    if uses_default_data:
        if ranks.local_rank == 0:
            make_default_data(plan)
        HostGroup().barrier()
    if ranks.rank == 0:
        from dsmoe_vl.checkpoint.store import hold

        plan.run_dir.mkdir(parents=True, exist_ok=True)
        lock = hold(plan.run_dir)
        changes = changed_settings(plan, plan.run_dir / "plan.json")
        for note in (*plan.notes, *[f"changed since the run's last start: {change}" for change in changes]):
            print(f"note: {note}", flush=True)

    from dsmoe_vl.training.trainer import Trainer

    trainer = Trainer(plan, ranks, stop)
    if ranks.rank == 0:
        (plan.run_dir / "plan.json").write_text(plan_to_json(plan))
    trainer.fit()
    trainer.close()
    if ranks.rank == 0:
        lock.close()


def missing_files(plan: RunPlan) -> Iterator[str]:
    """What training will look for and this machine does not have. Raises ConfigError for a tokenizer that cannot be."""
    from dsmoe_vl.data.shards.download import is_remote
    from dsmoe_vl.data.tokenizer import Tokenizer

    data, tokenizer = plan.recipe.data, Path(plan.recipe.tokenizer.path)
    for part, sources in (("data.sources", data.sources), ("data.evaluation", data.evaluation)):
        for source in sources:
            if not is_remote(source.path) and not Path(source.path).is_dir():
                yield f"{part}, {source.name}: {source.path}"
    if tokenizer.is_file():
        Tokenizer(tokenizer).require_fit(plan.recipe.tokenizer.vocab_size)
    else:
        yield f"tokenizer.path: {tokenizer}"


def make_default_data(plan: RunPlan) -> None:
    """The quickstart's synthetic shards and tokenizer, whichever of them is missing."""
    from data_tools.synthetic.generate import generate
    from data_tools.tokenizer.train import train as train_tokenizer

    tokenizer = Path(plan.recipe.tokenizer.path)
    sources = [Path(source.path) for source in plan.recipe.data.sources]
    if not any(source.exists() for source in sources):
        print(f"{tokenizer.parent} has no shards: making the synthetic ones of the quickstart (once)", flush=True)
        generate(tokenizer.parent)
    if not tokenizer.exists():
        train_tokenizer(sources, tokenizer, vocab_size=plan.recipe.tokenizer.vocab_size)


def quiet_deepspeed(rank: int) -> None:
    """DeepSpeed at warning level, on other ranks than 0 at error level, unless DSMOE_VL_VERBOSE asks for all of it."""
    if "DSMOE_VL_VERBOSE" not in os.environ:
        import logging

        log = logging.getLogger("DeepSpeed")
        log.setLevel(logging.ERROR if rank else logging.WARNING)
        # Its schedules ask themselves too early, and warn.
        log.addFilter(lambda record: "before it has started" not in record.getMessage())
        # DeepSpeed calls a collective by its old name; the user can do nothing about it.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
