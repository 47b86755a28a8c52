"""What the planner says of the recipes base and large on 8 to 4,096 GPUs, for docs/scaling.md.

    python benchmarks/scaling.py [--json FILE] [--plot FILE]                              (a minute, no GPU)

Weak scaling: every rank has the same packs. Strong scaling: a step has the same packs over all ranks. For each number of
GPUs the search chooses ZeRO stage, expert parallelism, micro-batch, recomputation and offloading. The plot needs
matplotlib (the extra "compare").
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, Result

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.planner.campaign import BYTES_OF_A_PAIR, DAY
from dsmoe_vl.planner.cluster import cluster_of
from dsmoe_vl.planner.forecast import Forecast
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.search import search, with_packs

GPUS = (8, 64, 512, 4096)
GPU = "h200"
PACKS_OF_A_RANK, PACKS_OF_A_STEP = 8, 4096
WORKERS = 12  # loader processes a rank: a DGX H200 has 112 cores for eight GPUs
TOKENS, PAIRS = 1e12, 1e10
_SHARD_BYTES = 1e9


def best(recipe_name: str, gpus: int, packs: int) -> Forecast:
    """The fastest settings that fit. Raises ConfigError."""
    recipe = load_recipe(ROOT / f"launch/recipes/{recipe_name}.toml")
    recipe = replace(recipe, data=replace(recipe.data, workers=WORKERS, lanes=WORKERS * max(GPUS)))
    deepspeed = with_packs(load_deepspeed(ROOT / "ds_configs/moe_zero3.json"), packs, gpus)
    plan = resolve(recipe, deepspeed, gpus, device="cuda", bf16_unit=True)
    return search(plan, cluster_of(GPU), TOKENS)[0][1]


def row(found: Forecast) -> dict[str, Any]:
    """The figures of a forecast that a table shows."""
    plan, run = found.plan, found.run
    zero = plan.deepspeed["zero_optimization"]
    return {
        "tokens_per_second": found.tokens_per_second, "mfu": found.mfu, "step_seconds": found.time.total,
        "parts": asdict(found.time), "memory_bytes": found.memory.device, "zero_stage": plan.zero_stage,
        "ep_size": plan.ep_size, "micro_batch": plan.micro_batch, "accumulation": plan.accumulation,
        "recomputed": plan.activation_checkpointing,
        "offload": [part for part in ("offload_optimizer", "offload_param") if part in zero],
        "days": run.seconds / DAY, "gpu_hours": run.accelerator_hours, "failures": run.failures,
        "lost_share": run.lost_share, "save_every_seconds": run.save_every, "save_seconds": run.save_seconds,
        "checkpoint_bytes": run.checkpoint_bytes, "pictures_per_second": run.pictures_per_second,
        "read_rate": run.read_rate,
    }  # fmt: skip


def figures() -> dict[str, Any]:
    """Both kinds of scaling for both recipes, and what internet scale needs."""
    found: dict[str, Any] = {"gpu": GPU, "tokens": TOKENS, "workers": WORKERS, "weak": {}, "strong": {}}
    for name in ("base", "large"):
        for kind, packs_of in (("weak", lambda gpus: gpus * PACKS_OF_A_RANK), ("strong", lambda gpus: PACKS_OF_A_STEP)):
            found[kind][name] = {str(gpus): row(best(name, gpus, packs_of(gpus))) for gpus in GPUS}
            print(kind, name, {gpus: f"{of['mfu']:.3f}" for gpus, of in found[kind][name].items()}, flush=True)
    rates = json.loads((RESULTS / "data.json").read_text())["figures"]
    converter = rates["rates"]["converter"]["samples_per_second"] / rates["workers"]
    found["internet"] = {
        "pairs": PAIRS, "bytes": PAIRS * BYTES_OF_A_PAIR, "shards": PAIRS * BYTES_OF_A_PAIR / _SHARD_BYTES,
        "converted_per_second_and_core": converter, "core_hours_of_1e8_records": 1e8 / converter / 3600,
        "core_hours": PAIRS / converter / 3600,
    }  # fmt: skip
    return found


def draw(found: dict[str, Any], file: Path) -> None:
    """Tokens a second of one GPU, and below where its time goes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, 4, figsize=(14, 7), dpi=100, height_ratios=(1, 1.3))
    columns = [(kind, name) for kind in ("weak", "strong") for name in ("base", "large")]
    for (above, below), (kind, name) in zip(zip(*rows, strict=True), columns, strict=True):
        points = found[kind][name]
        labels = [f"{int(gpus):,}" for gpus in points]
        above.plot(labels, [of["tokens_per_second"] / int(gpus) for gpus, of in points.items()], marker="o")
        above.set_title(f"{name}, {kind} scaling")
        above.set_ylim(bottom=0)
        above.set_ylabel("tokens/s of one GPU")
        bottom = [0.0] * len(points)
        for part in next(iter(points.values()))["parts"]:
            shares = [of["parts"][part] / of["step_seconds"] for of in points.values()]
            if max(shares) > 0.005:
                below.bar(labels, shares, bottom=bottom, label=part.replace("_", " "))
                bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        below.set_xlabel("GPUs")
        below.set_ylabel("share of the step")
        below.legend(fontsize=7, loc="lower left")
        above.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    """Search, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    parser.add_argument("--plot", type=Path, help="draw docs/images/scaling.png")
    args = parser.parse_args()
    found = figures()
    if args.plot:
        draw(found, args.plot)
    if args.json:
        Result.now("scaling", found).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
