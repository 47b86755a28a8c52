"""Examine a recipe or a cluster: `python launch/doctor.py objective|lr|weights|cluster --recipe FILE [key=value ...]`.

`objective` runs the recipe on its own data with a small model, split in many ways over ranks, expert parallelism, ZeRO
stages, accumulation and packing order, and compares every loss term and gradient with one rank. It also checks for
faults that raise no error. Takes some minutes on the CPU, in two processes. Exit status 1 if a check fails.

`lr` trains the recipe's real model for some steps at several learning rates, on the GPU if there is one, compares the
held-out losses and suggests `optimizer.params.lr`. Exit status 1 if every rate diverges.

`weights` trains it likewise, then measures how strongly each task pulls, and suggests the tasks' weights.

`cluster`, alone, under a launcher or with `--hostfile FILE`, finds what is wrong with hosts, links, data and settings
before a run does, in less than a minute. Exit status 1 after a problem.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Torch reads it when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe_vl.command import leave, print_error, run
from dsmoe_vl.doctor.command_line import parse
from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.parallel.ranks import Ranks

_ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Exit status: 0 if all checks passed or a rate is suggested, 1 if not, 2 for a user's error."""
    args = parse(_ROOT)
    if args.subject in ("lr", "weights"):
        return run(lambda: train_in_short(args))
    if args.subject == "cluster":
        return run(lambda: check_cluster(args), print_error if is_first_of_host() else lambda error: None)
    # Torch and DeepSpeed read these when they are imported.
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if args.results is None:
        return run(start_splits)
    return run(lambda: examine_split(args), print_error if os.environ["RANK"] == "0" else lambda error: None)


def train_in_short(args: argparse.Namespace) -> int:
    """Race learning rates, or weigh tasks. Returns the exit status. Raises DsmoeVlError."""
    from dsmoe_vl.parallel.device import device_name

    device_name()  # sets what DeepSpeed reads when it is imported
    from dsmoe_vl.doctor.learning_rate import STEPS, find_rate
    from dsmoe_vl.doctor.task_gradients import find_weights

    steps = STEPS if args.steps is None else args.steps
    world_size = 1 if args.world_size is None else args.world_size
    if args.subject == "weights":
        return find_weights(args.recipe, args.deepspeed, args.overrides, steps, world_size)
    return find_rate(args.recipe, args.deepspeed, args.overrides, args.rates or [], steps, world_size)


def check_cluster(args: argparse.Namespace) -> int:
    """Examine a cluster, as one of its ranks or alone. Returns the exit status. Raises DsmoeVlError."""
    from dsmoe_vl.parallel.device import device_name

    device_name()  # sets what DeepSpeed reads when it is imported
    from dsmoe_vl.doctor.cluster.case import Request
    from dsmoe_vl.doctor.cluster.examine import examine_cluster

    return examine_cluster(Request(args.recipe, args.deepspeed, args.overrides, args.hostfile, args.part, args.name))


def is_first_of_host() -> bool:
    """Whether this process reports a user's error: each host may have its own, and one message of it is enough."""
    try:
        return Ranks.discover().local_rank == 0
    except DsmoeVlError:
        return True


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
