"""Which learning rates suit scenes and real pictures alike? The search behind ds_configs/moe.json and the recipes.

    python benchmarks/rates.py [--pictures DIR] [--jobs 2]                  (some 25 minutes on two cores)

Three rates: of the body (vision, attention, feed-forwards, experts, router), which is the DeepSpeed JSON's; of the
embedding, which is also the output projection; and of the heads (the last norm, retrieval, importance). The latter two
are factors of the first in the recipe's [train]. Each choice trains compare.py's scenes (three tasks; held-out
loss) and learning.py's pictures (captions and retrieval together), one seed. Runs are kept in runs/rates; those that
are there are not trained again. Writes benchmarks/results/rates.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compare import SCENES
from learning import settings
from record import RESULTS, ROOT, Result
from run import DEEPSPEED, Run

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.parts import PARTS

PAIRS = 24_000  # of pictures and texts
Rates = tuple[float, float, float]  # of body, embedding and heads
RATES: tuple[Rates, ...] = (
    (3e-4, 3e-4, 3e-4), (3e-4, 1e-3, 1e-3), (3e-4, 2e-3, 2e-3), (3e-4, 2e-3, 3e-4), (3e-4, 3e-3, 3e-4),
    (3e-4, 4e-3, 3e-4), (6e-4, 6e-4, 6e-4), (6e-4, 2e-3, 2e-3), (6e-4, 4e-3, 4e-3), (6e-4, 2e-3, 6e-4),
    (1.2e-3, 2e-3, 2e-3), (2e-3, 2e-3, 2e-3),
)  # fmt: skip


def by_part(body: float, embedding: float, heads: float) -> tuple[str, ...]:
    """Overrides of a recipe, for a DeepSpeed JSON with the body's rate."""
    seeing = [part for part in PARTS if part != "speech"]  # the recipes do not hear
    factors = dict.fromkeys(seeing, 1.0) | {"embedding": embedding / body, "heads": heads / body}
    return tuple(f"train.{part}.lr_scale={factor:.6g}" for part, factor in factors.items())


def scenes(rates: Rates, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Held-out losses after the last step."""
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed = load_deepspeed(DEEPSPEED)
    deepspeed["optimizer"]["params"]["lr"] = rates[0]
    file = folder / "deepspeed.json"
    file.write_text(json.dumps(deepspeed))
    common = (*SCENES.common, f"run.steps={args.steps}", *by_part(*rates), *args.overrides)
    run = Run(folder, args.recipe, common, deepspeed=file)
    run.train()
    last = [line for line in run.metrics() if "eval_loss" in line][-1]
    return {name: value for name, value in last.items() if name.startswith("eval_loss")}


def pictures(rates: Rates, folder: Path, pairs: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The last point of learning_run.py."""
    kept = folder / "pictures.json"
    if not kept.exists():
        command = [
            sys.executable, str(ROOT / "benchmarks/learning_run.py"), "together", "--points", "1",
            "--pairs", str(pairs), "--rate", str(rates[0]), *by_part(*rates), *overrides,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def rates_of(text: str) -> Rates:
    """ "3e-4,2e-3,3e-4" as numbers. Raises ValueError."""
    body, embedding, heads = map(float, text.split(","))
    return body, embedding, heads


def main() -> int:
    """Train what is missing, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="as learning.py's")
    parser.add_argument(
        "--rates", type=rates_of, nargs="+", default=RATES, metavar="BODY,EMBEDDING,HEADS", help="learning rates"
    )
    parser.add_argument("--recipe", type=Path, default=SCENES.recipe, help="the recipe of the scenes")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of pictures and texts")
    parser.add_argument("--steps", type=int, default=SCENES.steps, help="optimizer steps on scenes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/rates")
    parser.add_argument("--shards", type=Path, default=Path("data/learning"), help="as learning.py's")
    parser.add_argument("--json", type=Path, default=RESULTS / "rates.json", help="the result file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings of the scenes")
    args = parser.parse_intermixed_args()
    folder = args.pictures and args.pictures.resolve()
    os.chdir(ROOT)  # where the recipes' paths begin
    overrides = settings(folder, args.shards / folder.name if folder else args.shards)

    def measure(rates: Rates) -> dict[str, Any]:
        where = args.runs / "_".join(f"{rate:g}" for rate in rates)
        found = {
            "rates": rates,
            "scenes": scenes(rates, where, args),
            "pictures": pictures(rates, where, args.pairs, overrides),
        }
        print(json.dumps(found), flush=True)
        return found

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(measure, args.rates))
    of = folder.name if folder else "the quickstart's pictures"
    Result.now("rates", {"pictures": of, "steps": args.steps, "rates": rows}).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
