"""What do real weights bring? The recipe of `launch/pretrained.sh` from them, and the same model from nothing.

    python benchmarks/pretrained.py [--steps 60] [--seeds 1 2 3] [--jobs 2] [--json FILE]

Needs what `bash launch/pretrained.sh` makes: the imported weights and the quickstart's shards. Each run is a process on
one core, with the same packs; runs are kept in runs/compare_pretrained, and those that are there are not trained again.
With real weights the connector trains alone for two fifths of the steps, as in the recipe; from nothing all trains. So
few steps have a warm-up of an eighth of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, Result
from run import DEEPSPEED, Run

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.imported import DEFAULTS, MODEL_NAME
from dsmoe_vl.config.load import load_recipe

_RECIPE = ROOT / "launch/recipes/pretrained.toml"
REAL, NOTHING = "real weights", "from nothing"


def shapes(folder: Path) -> tuple[str, ...]:
    """Overrides that give a recipe the shapes and the tokenizer of imported weights, and not the weights."""
    found = json.loads((folder / MODEL_NAME).read_text(encoding="utf-8"))
    defaults = found.pop(DEFAULTS, {})
    tokenizer = found["tokenizer"]
    tokenizer["path"] = str(folder / tokenizer["path"])
    del tokenizer["sha256"]
    return ('model.init_from=""', "stages=[]", *_overrides(found), *_overrides(defaults))


def _overrides(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _overrides(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def ways(steps: int) -> dict[str, tuple[str, ...]]:
    """Overrides of the recipe, by what a run starts from."""
    recipe = load_recipe(_RECIPE)
    first, scale = 2 * steps // 5, recipe.stages[0].lr_scale
    stages = (
        f'stages=[{{steps={first}, lr_scale={scale}, train={{"*"={{freeze=true}}, connector={{freeze=false}}}}}}, '
        f"{{steps={steps - first}, train={{vision={{lr_scale=0.3}}}}}}]"
    )
    return {REAL: (stages,), NOTHING: shapes(Path(recipe.model.init_from))}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train all, and read their held-out losses, nats a token."""
    every = max(args.steps // 6, 1)
    always = (f"run.steps={args.steps}", f"run.evaluate_every={every}", f"run.checkpoint_every={args.steps}")
    deepspeed = load_deepspeed(DEEPSPEED)
    deepspeed["scheduler"]["params"]["warmup_num_steps"] = max(args.steps // 8, 1)
    args.runs.mkdir(parents=True, exist_ok=True)
    file = args.runs / "deepspeed.json"
    file.write_text(json.dumps(deepspeed))
    runs = {
        (way, seed): Run(
            args.runs / f"{way.replace(' ', '_')}_{seed}", _RECIPE,
            (*overrides, *always, *args.overrides, f"run.seed={seed}"), deepspeed=file,
        )
        for seed in args.seeds
        for way, overrides in ways(args.steps).items()
    }  # fmt: skip
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(Run.train, runs.values()))
    curves = {
        key: {line["step"]: line["eval_loss_caption"] for line in run.metrics() if "eval_loss_caption" in line}
        for key, run in runs.items()
    }
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))  # a stage's end is one more
    losses = {way: [[curves[way, seed][step] for step in steps] for seed in args.seeds] for way in (REAL, NOTHING)}
    return {"seeds": args.seeds, "steps": steps, "losses": losses}


def main() -> int:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/compare_pretrained")
    parser.add_argument("--json", type=Path, default=RESULTS / "pretrained.json", help="the result file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)  # where the recipe's paths begin
    found = measure(args)
    for way, losses in found["losses"].items():
        print(f"{way}: held-out caption loss {statistics.fmean(seed[-1] for seed in losses):.3f}")
    Result.now("pretrained", found).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
