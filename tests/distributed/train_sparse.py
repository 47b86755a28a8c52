"""Train a tiny model with the L1 term, anew for every ZeRO stage; print what `sparsity` says after each step as JSON.

The gathered weights are written to FOLDER/STAGE, so that a test can count for itself. The packs of a step
are the same whatever the split.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dsmoe_vl.config.recipe import L1Config, ObjectiveConfig
from dsmoe_vl.optim.l1 import sparsity
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.process_group import start_process_group
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import build_tasks
from dsmoe_vl.training.engine import build_engine
from tests.distributed.stepping import report, take_steps
from tests.distributed.train_losses import RECIPE
from tests.support.checkpoints import save_weights

L1 = L1Config(weight=0.6, experts=1.0, matrices=0.5, vectors=0.25)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zero", type=int, nargs="+", required=True)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--offload", action="store_true")
    args = parser.parse_args()
    ranks = Ranks.discover()
    device = use_device("cpu", ranks)
    start_process_group(ranks, "cpu")
    recipe = replace(RECIPE, objective=ObjectiveConfig(L1), train={})
    found = {}
    for stage in args.zero:
        deepspeed = {
            "train_micro_batch_size_per_gpu": 2 // ranks.world_size,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 6e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
            "bf16": {"enabled": args.bf16},
            "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu" if args.offload else "none"}},
            "expert_parallel": {"enabled": True, "autoep_size": args.ep},
        }
        plan = resolve(recipe, deepspeed, ranks.world_size, device="cpu", bf16_unit=True)
        engine = build_engine(plan, ranks, build_tasks(recipe, None))
        found[stage] = []
        for _ in take_steps(plan, ranks, engine, device, args.steps):
            found[stage].append(sparsity(engine.module, plan, ranks.rank, device))
        folder = args.folder / str(stage)
        folder.mkdir(exist_ok=True)
        save_weights(engine.module, folder)
        engine.destroy()
    report(ranks, found)


if __name__ == "__main__":
    main()
