"""Plans and runs a training. Every check that needs no model runs before a process group exists, and no plan imports
torch."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.console import tell
from dsmoe_vl.data.shards.download import is_remote
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.data.word_start import describe_word_start
from dsmoe_vl.files import write_atomically
from dsmoe_vl.parallel.device import device_name, has_bf16_unit
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan, changed_settings, plan_to_json
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.training.signals import StopRequest

_CTRL_C = (
    "Ctrl-C on `deepspeed` over several hosts stops every DeepSpeed run of this environment on them, and gives "
    "each 30 s to save a checkpoint: to stop this run alone, send SIGTERM to one of its ranks"
)


@dataclass(frozen=True)
class Request:
    """A user's request. `overrides`: section.key=value; `strict`: a plan that differs from the request is an error."""

    recipe: Path
    deepspeed: Path
    overrides: Sequence[str] = ()
    run_dir: Path | None = None  # overrides run.directory and run.name
    strict: bool = False


def plan_run(request: Request, world_size: int) -> RunPlan:
    """The resolved plan for this type of device. Raises ConfigError."""
    recipe = load_recipe(request.recipe, request.overrides)
    if request.run_dir is not None:
        run = replace(recipe.run, directory=str(request.run_dir.parent), name=request.run_dir.name)
        recipe = replace(recipe, run=run)
    device = device_name()
    return resolve(
        recipe,
        load_deepspeed(request.deepspeed),
        world_size,
        device=device,
        bf16_unit=has_bf16_unit(device),
        strict=request.strict,
        recipe_file=f"{request.recipe} with the command line's settings" if request.overrides else str(request.recipe),
        deepspeed_file=str(request.deepspeed),
    )


def is_supervised() -> bool:
    """Whether this process is a rank that a supervisor started; if so, it ends when that one does."""
    from dsmoe_vl.training.restarts import end_with_supervisor

    return end_with_supervisor()


def supervise(request: Request, ranks: Ranks, stop: StopRequest, restarts: int, command: Sequence[str]) -> int:
    """Run `command` as this process's rank, and again after a failure: the status. Raises DsmoeVlError."""
    from dsmoe_vl.training.restarts import Supervisor

    recipe, deepspeed = load_recipe(request.recipe, request.overrides), load_deepspeed(request.deepspeed)
    run_dir = request.run_dir or Path(recipe.run.directory, recipe.run.name)

    def command_of(number: int) -> list[str]:
        return [word for word in command if number == 0 or word != "--fresh"]

    def check(world_size: int) -> None:
        resolve(recipe, deepspeed, world_size, device="cpu", bf16_unit=False, recipe_file=str(request.recipe))

    return Supervisor(ranks, stop, command_of, run_dir, restarts, check).run()


def missing_files(plan: RunPlan) -> Iterator[str]:
    """Files that training needs and this machine lacks. Raises ConfigError if the tokenizer does not fit the recipe."""
    data, tokenizer = plan.recipe.data, Path(plan.recipe.tokenizer.path)
    for part, sources in (("data.sources", data.sources), ("data.evaluation", data.evaluation)):
        for source in sources:
            if not is_remote(source.path) and not Path(source.path).is_dir():
                yield f"{part}, {source.name}: {source.path}"
    if tokenizer.is_file():
        Tokenizer.of(plan.recipe)
    else:
        yield f"tokenizer.path: {tokenizer}"
    if (vectors := plan.recipe.model.embedding_from) and not Path(vectors).is_file():
        yield f"model.embedding_from: {vectors}"


def first_words(plan: RunPlan) -> str:
    """How many pieces of the tokenizer start from `model.embedding_from`, in a line; "" if none do, or if a file is not
    here. Raises ConfigError."""
    vectors, tokenizer = plan.recipe.model.embedding_from, Path(plan.recipe.tokenizer.path)
    if not vectors or not Path(vectors).is_file() or not tokenizer.is_file():
        return ""
    return describe_word_start(plan.recipe, Tokenizer.of(plan.recipe))


def train(
    plan: RunPlan,
    ranks: Ranks,
    stop: StopRequest,
    make_data: Callable[[RunPlan], None] | None = None,
    fresh: bool = False,
) -> None:
    """Start the process group and train, on every rank. `make_data` is called once on each host before data is read.
    `fresh`: begin anew; a run that is there is kept under another name."""
    _quiet_deepspeed(ranks.rank)
    from dsmoe_vl.checkpoint.store import CHECKPOINTS_NAME, PLAN_NAME, lock_run, remove_unfinished
    from dsmoe_vl.monitor.mirror import require_packages
    from dsmoe_vl.parallel.process_group import HostGroup, end_process_group, start_process_group
    from dsmoe_vl.training.same_copies import require_same_copies

    require_packages(plan)
    start_process_group(ranks, plan.device, plan.recipe.run.stall_seconds)
    host = HostGroup()
    if make_data is not None:
        if ranks.local_rank == 0:
            make_data(plan)
        host.barrier()
    require_same_copies(plan.recipe, ranks, host)
    if ranks.rank == 0:
        if fresh:
            _set_aside(plan.run_dir)
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_run(plan.run_dir)
        unfinished = remove_unfinished(plan.run_dir / CHECKPOINTS_NAME)
        changes = changed_settings(plan, plan.run_dir / PLAN_NAME)
        words = "" if (plan.run_dir / PLAN_NAME).exists() else first_words(plan)  # a run that goes on has its own
        notes = [
            *plan.notes,
            *([words] if words else []),
            *(f"{name} was not finished; removed" for name in unfinished),
            *[f"changed since the run's last start: {change}" for change in changes],
        ]
        if stop.has_deepspeed_launcher and ranks.world_size > ranks.local_size:
            notes.append(_CTRL_C)
        for note in notes:
            tell(f"note: {note}")

    from dsmoe_vl.training.trainer import Trainer

    is_over = False
    while not is_over:  # a stage each time, from the checkpoint of the one before
        trainer = Trainer(plan, ranks, stop)
        if ranks.rank == 0 and trainer.step < plan.recipe.run.steps:
            write_atomically(plan.run_dir / PLAN_NAME, plan_to_json(plan))
        trainer.fit()
        trainer.close()
        is_over = trainer.is_stopped or trainer.step >= plan.recipe.run.steps
        del trainer
        gc.collect()  # the engine, before the next one is made
    end_process_group()
    if ranks.rank == 0:
        lock.close()


def _set_aside(run_dir: Path) -> None:
    """Rename a run's folder. Raises CheckpointError while it is being trained."""
    if not run_dir.exists():
        return
    from dsmoe_vl.checkpoint.store import lock_run

    lock_run(run_dir).close()
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.before_{number}")).exists():
        number += 1
    run_dir.rename(kept)
    tell(f"note: the run that was in {run_dir} is kept in {kept}")


def _quiet_deepspeed(rank: int) -> None:
    """Log level of DeepSpeed: warning on rank 0, error on other ranks, unchanged if DSMOE_VL_VERBOSE is set."""
    if "DSMOE_VL_VERBOSE" in os.environ:
        return
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.ERROR if rank else logging.WARNING)
    # Its schedulers read their learning rate before the first step, and warn. Skipped steps are in our own lines.
    known = ("before it has started", "OVERFLOW! Skipping step")
    log.addFilter(lambda record: not any(text in record.getMessage() for text in known))
    # DeepSpeed calls a collective by its deprecated name; the user cannot change that.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
