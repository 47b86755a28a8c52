"""Take two steps of a tiny model anew for every ZeRO stage; print the gradient's norms, of all and by part, as JSON."""

from __future__ import annotations

import argparse

from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.process_group import start_process_group
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import build_tasks
from dsmoe_vl.training.engine import build_engine
from tests.distributed.stepping import report, take_steps
from tests.distributed.train_losses import RECIPE


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", type=int, nargs="+", required=True)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--offload", action="store_true")
    args = parser.parse_args()
    ranks = Ranks.discover()
    device = use_device("cpu", ranks)
    start_process_group(ranks, "cpu")
    found = {}
    for stage in args.zero:
        deepspeed = {
            "train_micro_batch_size_per_gpu": 2 // ranks.world_size,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.1,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
            "bf16": {"enabled": args.bf16},
            "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu" if args.offload else "none"}},
            "expert_parallel": {"enabled": True, "autoep_size": args.ep},
        }
        plan = resolve(RECIPE, deepspeed, ranks.world_size, device="cpu", bf16_unit=True)
        engine = build_engine(plan, ranks, build_tasks(RECIPE, None))
        found[stage] = []
        for result in take_steps(plan, ranks, engine, device, 2, part_norms=True):
            norms = {part: float(norm) for part, norm in result.part_norms.items()}
            found[stage].append({"all": result.grad_norm, **norms})
        engine.destroy()
    report(ranks, found)


if __name__ == "__main__":
    main()
