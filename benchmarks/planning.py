"""The planner beside this machine: step time and peak memory of configurations that the calibration has not seen.

    python benchmarks/planning.py [--cluster FILE] [--json FILE]    (six minutes on two idle cores; more beside others)

First the machine is measured, as by `launch/plan.py --calibrate`, or a file of that is taken. Times are the
processor's, of one rank, so that other work on the machine counts less; of two ranks, memory is compared only. FLOPs
are compared with torch's own count in tests/parity/test_planner.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import Result

from dsmoe_vl.doctor.calibration import measure_cluster, shape_of, small_plan
from dsmoe_vl.doctor.timed_step import time_steps
from dsmoe_vl.planner.cluster import Cluster, load_cluster
from dsmoe_vl.planner.run_memory import run_memory
from dsmoe_vl.planner.step_time import step_time

_RECOMPUTE: dict[str, Any] = {"activation_checkpointing": {}}
_WIDE = ["model.width=512", "model.heads=8", "model.kv_heads=2", "moe.ffn_width=768", "model.ffn_width=2048"]
# Overrides of the recipe quickstart, packs, ranks, settings of the DeepSpeed JSON.
CONFIGURATIONS: dict[str, tuple[list[str], int, int, dict[str, Any]]] = {
    "2 packs": ([], 2, 1, {}),
    "8 packs": ([], 8, 1, {}),
    "4 packs, recomputed": ([], 4, 1, _RECOMPUTE),
    "6 layers, 4 packs": (["model.layers=6"], 4, 1, {}),
    "width 512, 4 packs": (_WIDE, 4, 1, {}),
    "width 512, 4 packs, recomputed, ZeRO-1": (_WIDE, 4, 1, {**_RECOMPUTE, "zero_optimization": {"stage": 1}}),
    "16 experts, 4 a token, 4 packs": (["moe.experts=16", "moe.top_k=4"], 4, 1, {}),
    "dense, 4 packs": (["moe.first_dense_layers=4"], 4, 1, {}),
    "tower of 6 layers, width 256, 4 packs": (["model.vision.layers=6", "model.vision.width=256"], 4, 1, {}),
    "2 x 3 accumulated, ZeRO-0": ([], 2, 1, {"gradient_accumulation_steps": 3, "zero_optimization": {"stage": 0}}),
    "two ranks, EP 2, ZeRO-2, width 512, 2 packs": (_WIDE, 2, 2, {}),
    "two ranks, EP 2, ZeRO-3, width 512, 2 packs": (_WIDE, 2, 2, {"zero_optimization": {"stage": 3}}),
}


def compared(name: str, cluster: Cluster, steps: int) -> dict[str, float | None]:
    """What is measured and what the planner says; None is not compared."""
    overrides, packs, ranks, deepspeed = CONFIGURATIONS[name]
    plan = small_plan(overrides, packs, ranks, **deepspeed)
    timed = time_steps(plan, steps)
    shape = shape_of(plan, timed)
    alone = ranks == 1
    return {
        "step_seconds": timed.processor_seconds if alone else None,
        "wall_seconds": timed.seconds,
        "predicted_seconds": step_time(plan, cluster, 0.0, shape).total if alone else None,
        "peak_mib": timed.peak_bytes / 2**20,
        "predicted_mib": run_memory(plan, cluster, shape).device / 2**20,
    }


def main() -> int:
    """Measure the machine, then every configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", type=Path, metavar="TOML", help="of launch/plan.py --calibrate on this machine")
    parser.add_argument(
        "--configurations", nargs="+", default=[*CONFIGURATIONS], choices=CONFIGURATIONS, metavar="NAME"
    )
    parser.add_argument("--steps", type=int, default=4, help="of each")
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = args.cluster or Path(folder, "cpu.toml")
        if not args.cluster:
            file.write_text(measure_cluster())
        cluster = load_cluster(file)
    found = {}
    for name in args.configurations:
        of = found[name] = compared(name, cluster, args.steps)
        print(name, {key: value if value is None else round(value, 3) for key, value in of.items()}, flush=True)
    figures = {
        "device": "cpu",
        "steps": args.steps,
        "reserved_mib": cluster.reserved_bytes / 2**20,
        "configurations": found,
    }
    if args.json:
        Result.now("planning", figures).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
