"""Why does it learn as fast as it does? One change at a time, on the pictures of learning.py.

    python benchmarks/ablations.py --pictures DIR [--changes NAME ...] [--jobs 1]

Each change trains in a process of its own on one core, with as many pairs; those measured already are not trained
again. Writes benchmarks/results/ablations.json. The baseline has several seeds: their range is the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ablation_changes as change
import learning_run
from learning import settings
from record import RESULTS, ROOT, Result

from dsmoe_vl.config.deepspeed_json import load_deepspeed


@dataclass(frozen=True)
class Ablation:
    """A change to the baseline: settings of the recipe, of the DeepSpeed JSON, the program; or another variant."""

    cause: str
    recipe: tuple[str, ...] = ()
    deepspeed: dict[str, Any] = field(default_factory=dict)  # by path, with dots
    program: change.Replacement | None = None
    variant: str = "retrieval"
    rate: float = 3e-4
    seed: int = 1


BASE = "baseline: retrieval alone, rate 3e-4"


def _rates(factor: float, *parts: str) -> tuple[str, ...]:
    return tuple(f"train.{part}.lr_scale={factor}" for part in parts)


_AUGMENT = ("data.augment.zoom=0.06", "data.augment.shift=0.03")
_CLIP, _SCHEDULER = "gradient_clipping", "scheduler.params."
_HALVES = {"gradient_accumulation_steps": 2}
ABLATIONS = {
    BASE: Ablation("baseline"),
    BASE + ", another seed": Ablation("baseline", seed=2),
    BASE + ", a third seed": Ablation("baseline", seed=3),
    "rate 2e-3": Ablation("rate", rate=2e-3),
    "rate 1e-3": Ablation("rate", rate=1e-3),
    "rate 6e-4": Ablation("rate", rate=6e-4),
    "rate 1.5e-4": Ablation("rate", rate=1.5e-4),
    "warm-up of 10 steps": Ablation("schedule", deepspeed={_SCHEDULER + "warmup_num_steps": 10}),
    "warm-up of 150 steps": Ablation("schedule", deepspeed={_SCHEDULER + "warmup_num_steps": 150}),
    "constant after the warm-up": Ablation("schedule", deepspeed={_SCHEDULER + "cos_min_ratio": 1.0}),
    "rate 2e-3, vision 3e-4": Ablation("rate by part", _rates(0.15, "vision", "connector"), rate=2e-3),
    "rate 2e-3, attention 3e-4": Ablation("rate by part", _rates(0.15, "attention"), rate=2e-3),
    "rate 2e-3, all but embedding and heads 3e-4": Ablation(
        "rate by part", _rates(0.15, "vision", "connector", "attention", "feed_forward", "experts", "router"), rate=2e-3
    ),
    "embedding 3e-3": Ablation("rate by part", _rates(10, "embedding")),
    "vision 1e-3": Ablation("rate by part", _rates(3.3, "vision", "connector")),
    "experts 1e-3": Ablation("rate by part", _rates(3.3, "experts")),
    "router 1e-4": Ablation("rate by part", _rates(0.33, "router")),
    "no clipping": Ablation("clipping", deepspeed={_CLIP: 0.0}),
    "clipping at 0.3": Ablation("clipping", deepspeed={_CLIP: 0.3}),
    "zoom 6 %, shift 3 %": Ablation("augmentation", _AUGMENT),
    "zoom 6 %, shift 3 %, colour 20 %": Ablation("augmentation", (*_AUGMENT, "data.augment.colour=0.2")),
    "convolutional stem": Ablation("stem and patch", program=change.convolutional_stem),
    "patches of 8 pixels": Ablation("stem and patch", ("model.vision.patch_size=8", "data.image_max_patches=64")),
    "read at the embedding token": Ablation("where embeddings are read", ('tasks.retrieval.pooling="last"',)),
    "read a layer earlier": Ablation("where embeddings are read", program=change.earlier_layer(1)),
    "temperature 0.2 at the start": Ablation("temperature", program=change.start_of_scale(5.0)),
    "temperature's rate 3e-3": Ablation("temperature", program=change.groups({"log_scale": 10.0})),
    "negatives of half a step": Ablation("negatives", deepspeed=_HALVES, program=change.packs_of_half_a_step),
    "negatives of a step, by the gradient cache": Ablation(
        "negatives", ("tasks.retrieval.gradient_cache=true",), _HALVES, change.packs_of_half_a_step
    ),
    "steps of 220 pairs": Ablation("negatives", program=change.pairs_of_a_step(220)),
    "steps of 55 pairs": Ablation("negatives", program=change.pairs_of_a_step(55)),
    "pieces at random, alpha 0.3": Ablation("segmentation", program=change.sampled_pieces(0.3)),
    "no weight decay on embeddings": Ablation("weight decay", program=change.groups(undecayed=("embedding.weight",))),
    "no weight decay": Ablation("weight decay", deepspeed={"optimizer.params.weight_decay": 0.0}),
    "averaged weights, 0.98": Ablation("averaged weights", program=change.averaged(0.98)),
    "no balance term": Ablation("balance and z", ("moe.balance_weight=0",)),
    "no z term": Ablation("balance and z", ("moe.z_weight=0",)),
    "pictures see all of themselves": Ablation("attention", program=change.pictures_see_all),
    "together": Ablation("tasks", program=change.task_gradients, variant="together"),
    "together, captions weigh 0.3": Ablation("tasks", ("tasks.caption.weight=0.3",), variant="together"),
    "together, no clipping": Ablation("tasks", deepspeed={_CLIP: 0.0}, variant="together"),
    "together, pictures see all of themselves": Ablation("tasks", program=change.pictures_see_all, variant="together"),
    "captions": Ablation("tasks", variant="captions"),
    "captions, pictures see all of themselves": Ablation("tasks", program=change.pictures_see_all, variant="captions"),
}


def apply(ablation: Ablation) -> None:
    """Change this process."""
    if ablation.program is not None:
        ablation.program()

    def changed(path: Path) -> dict[str, Any]:
        found = load_deepspeed(path)
        for name, value in ablation.deepspeed.items():
            *sections, key = name.split(".")
            inner = found
            for section in sections:
                inner = inner[section]
            inner[key] = value
        return found

    learning_run.load_deepspeed = changed


def run_one(name: str, pairs: int, overrides: list[str]) -> None:
    """Train with one change in this process; prints its points."""
    ablation = ABLATIONS[name]
    apply(ablation)
    numbers = {"--points": 1, "--pairs": pairs, "--rate": ablation.rate, "--seed": ablation.seed}
    options = [str(word) for pair in numbers.items() for word in pair]
    sys.argv[1:] = [ablation.variant, *options, *overrides, *ablation.recipe]
    learning_run.main()


def measure(name: str, args: argparse.Namespace, overrides: tuple[str, ...]) -> dict[str, Any] | None:
    """The last point of a change, trained in a process of its own; None if it failed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, "--pairs", str(args.pairs), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    points = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not points:
        print(f"{name}: failed\n{done.stderr[-2000:]}", flush=True)
        return None
    print(f"{name}: {json.dumps(points[-1])}", flush=True)
    return points[-1]


def main() -> int:
    """Train what is missing, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="as learning.py's")
    parser.add_argument("--pairs", type=int, default=24_000, help="pairs that each change sees")
    parser.add_argument("--changes", nargs="+", choices=[*ABLATIONS], metavar="NAME", default=[*ABLATIONS])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, a core each")
    parser.add_argument("--shards", type=Path, default=Path("data/learning"))
    parser.add_argument("--json", type=Path, default=RESULTS / "ablations.json", help="the result file")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.one:
        run_one(args.one, args.pairs, args.overrides)
        return 0
    pictures = args.pictures and args.pictures.resolve()
    os.chdir(ROOT)  # where the recipes' paths begin
    overrides = settings(pictures, args.shards / pictures.name if pictures else args.shards)
    overrides = (*overrides, *_rates(1, "embedding", "experts"))  # the baseline has one rate
    found = Result.read(args.json).figures["changes"] if args.json.exists() else {}
    with ThreadPoolExecutor(args.jobs) as pool:
        wanted = [name for name in args.changes if name not in found]
        for name, point in zip(wanted, pool.map(lambda name: measure(name, args, overrides), wanted), strict=True):
            if point is None:
                continue
            found[name] = {"cause": ABLATIONS[name].cause} | point
            of = pictures.name if pictures else "the quickstart's pictures"
            ordered = {name: found[name] for name in ABLATIONS if name in found}
            Result.now("ablations", {"pictures": of, "changes": ordered}).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
