"""What the planner says of the recipes base and large on 8 to 4,096 GPUs, for docs/scaling.md.

    python benchmarks/scaling.py [--json FILE] [--plot FILE]                              (a minute, no GPU)

Weak scaling: every rank has the same packs. Strong scaling: a step has the same packs over all ranks. For each number
of GPUs the search chooses ZeRO stage, expert parallelism, micro-batch, recomputation and offloading. Also how the
packer fills packs with samples of many sizes. The plot needs matplotlib (the extra "compare").
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, ROOT, Result

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.pack import Encoded, Packer, PackShape
from dsmoe_vl.data.stream import SampleRef
from dsmoe_vl.planner.campaign import BYTES_OF_A_PAIR, DAY
from dsmoe_vl.planner.cluster import cluster_of
from dsmoe_vl.planner.forecast import Forecast
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.search import search, with_packs

GPUS = (8, 64, 512, 4096)
GPU = "h200"
PACKS_OF_A_RANK, PACKS_OF_A_STEP = 8, 512
WORKERS = 12  # loader processes a rank: a DGX H200 has 112 cores for eight GPUs
TOKENS, PAIRS = 1e12, 1e10
_SHARD_BYTES = 1e9
_NOWHERE = SampleRef(0, 0, 0, 0)


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
        "recompute": plan.recompute,
        "offload": [part for part in ("offload_optimizer", "offload_param") if part in zero],
        "days": run.seconds / DAY, "gpu_hours": run.accelerator_hours, "failures": run.failures,
        "lost_share": run.lost_share, "save_every_seconds": run.save_every, "save_seconds": run.save_seconds,
        "checkpoint_bytes": run.checkpoint_bytes, "pictures_per_second": run.pictures_per_second,
        "read_rate": run.read_rate,
    }  # fmt: skip


def packs_of_sizes(recipe_name: str, packs: int = 1000) -> dict[str, float]:
    """Shares of a pack's tokens and patches that are used, when the real packer gets samples of many sizes: four images
    to one video, of half to all of the patches that they may have, a video of half to all of its frames; texts of a
    log-normal length with a median of 30 tokens."""
    recipe, rng = load_recipe(ROOT / f"launch/recipes/{recipe_name}.toml"), np.random.default_rng(1)
    data, vision = recipe.data, recipe.model.vision
    cell = vision.merge**2

    def draw() -> Encoded:
        text = int(rng.lognormal(np.log(30), 0.6)) + 2
        if rng.random() < 0.2:
            frames = int(rng.integers(data.video_frames // 2, data.video_frames + 1))
            patches = frames * (int(data.frame_max_patches * rng.uniform(0.5, 1)) // cell * cell)
            return Encoded(_NOWHERE, "", [], patches // (cell * data.frame_pool**2) + text, patches)
        patches = int(data.image_max_patches * rng.uniform(0.5, 1)) // cell * cell
        return Encoded(_NOWHERE, "", [], patches // cell + text, patches)

    packer = Packer(PackShape.of(recipe), data.lookahead)
    filled = [packer.fill(draw) for _ in range(packs)]
    tokens = np.array([sum(sample.length for sample in pack) for pack in filled]) / data.pack_length
    patches = np.array([sum(sample.patches for sample in pack) for pack in filled]) / data.pack_patches
    return {
        "tokens_used": float(tokens.mean()), "patches_used": float(patches.mean()),
        "patches_spread": float(patches.std() / patches.mean()), "patches_most": float(patches.max()),
    }  # fmt: skip


def figures() -> dict[str, Any]:
    """Both kinds of scaling for both recipes, and what internet scale needs."""
    found: dict[str, Any] = {"gpu": GPU, "tokens": TOKENS, "workers": WORKERS, "weak": {}, "strong": {}}
    for name in ("base", "large"):
        for kind, packs_of in (("weak", lambda gpus: gpus * PACKS_OF_A_RANK), ("strong", lambda gpus: PACKS_OF_A_STEP)):
            possible = [gpus for gpus in GPUS if packs_of(gpus) % gpus == 0]
            found[kind][name] = {str(gpus): row(best(name, gpus, packs_of(gpus))) for gpus in possible}
            print(kind, name, {gpus: f"{of['mfu']:.3f}" for gpus, of in found[kind][name].items()}, flush=True)
    found["packs"] = {name: packs_of_sizes(name) for name in ("base", "large")}
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
    parts = list(next(iter(found["weak"]["base"].values()))["parts"])
    for (above, below), (kind, name) in zip(zip(*rows, strict=True), columns, strict=True):
        points = found[kind][name]
        labels = [f"{int(gpus):,}" for gpus in points]
        rates = [of["tokens_per_second"] / int(gpus) for gpus, of in points.items()]
        above.plot(labels, rates, marker="o")
        above.set_title(f"{name}, {kind} scaling")
        above.set_ylim(0, 1.1 * max(rates))
        above.set_ylabel("tokens/s of one GPU")
        above.grid(alpha=0.3)
        bottom = [0.0] * len(points)
        for number, part in enumerate(parts):
            shares = [of["parts"][part] / of["step_seconds"] for of in points.values()]
            below.bar(labels, shares, bottom=bottom, label=part.replace("_", " "), color=f"C{number}")
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        below.set_xlabel("GPUs")
        below.set_ylabel("share of the step")
    figure.legend(*below.get_legend_handles_labels(), loc="lower center", ncols=len(parts), fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
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
