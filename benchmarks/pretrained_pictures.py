"""What do real weights bring on real pictures? Retrieval from them, from nothing and over frozen features.

    python benchmarks/pretrained_pictures.py --pictures DIR [--pairs 12000] [--seeds 1] [--jobs 2] [--json FILE]

DIR is as learning.py takes it; all ways see as many pairs. From real weights: DINOv2-small and SmolLM2-135M with
experts made of its feed-forwards; three quarters of the pairs are what launch/align.py measures, the others train the
projections over the aligned states (pretrained_pictures.toml; needs what `bash launch/pretrained.sh` makes). From
nothing: the small model of learning.py. Frozen: features of DINOv2-small as transformers computes them, a small network
over them, and one over a bag of words and trigrams. A pair takes some 12 GFLOP with real weights to train, and a third
of that to measure, so there are fewer than in learning.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning import SCORES, Point, learn, settings
from learning_run import FROZEN, PRETRAINED, REAL
from record import RESULTS, ROOT, Result

NOTHING = "retrieval"
_TITLES = {REAL: "from real weights", NOTHING: "from nothing", FROZEN: FROZEN}


def _from_real_weights(seed: int, args: argparse.Namespace, sources: list[str], shards: Path) -> list[Point]:
    """Measure, then train; the points count both."""
    measured = 3 * args.pairs // 4
    aligned = shards / f"aligned_{measured}_{seed}"
    if aligned.exists():  # of an earlier run, maybe from other weights
        shutil.rmtree(aligned)
    align = [sys.executable, "launch/align.py", "--recipe", PRETRAINED, "--output", aligned, "--pairs", measured]
    process = subprocess.Popen([*map(str, align), f"run.seed={seed}", *sources])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{shlex.join(map(str, align))} failed")
    seconds = usage.ru_utime + usage.ru_stime
    trained = argparse.Namespace(**vars(args) | {"pairs": args.pairs - measured})
    points = learn(REAL, seed, trained, (*sources, f"model.init_from={aligned}"))  # with a tokenizer of its own
    return [point | {"pairs": measured + point["pairs"], "seconds": seconds + point["seconds"]} for point in points]


def main() -> int:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="DIR", required=True, help="with train.csv and test.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--pairs", type=int, default=12_000, help="pairs that each way sees")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate; factors are in the recipes")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, a core each")
    parser.add_argument("--points", type=int, default=3, help="points of each curve")
    parser.add_argument("--shards", type=Path, default=Path("data/learning"), help="where DIR's shards are kept")
    parser.add_argument("--json", type=Path, default=RESULTS / "pretrained_pictures.json", help="the result file")
    args = parser.parse_args()
    pictures = args.pictures.resolve()
    os.chdir(ROOT)  # where the recipes' paths begin
    *sources, tokenizer = settings(pictures, args.shards / pictures.name)
    found = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            found[REAL, seed] = pool.submit(_from_real_weights, seed, args, sources, args.shards / pictures.name)
            for variant in (NOTHING, FROZEN):
                found[variant, seed] = pool.submit(learn, variant, seed, args, (*sources, tokenizer))
    points = {run: future.result() for run, future in found.items()}
    curves = {title: [points[variant, seed] for seed in args.seeds] for variant, title in _TITLES.items()}
    for title, seeds in curves.items():
        means = {
            score: statistics.fmean(seed[-1][score] for seed in seeds) for score in SCORES if score in seeds[0][-1]
        }
        print(f"{title}: " + ", ".join(f"{SCORES[score]} {100 * mean:.1f} %" for score, mean in means.items()))
    figures = {"pictures": pictures.name, "pairs": args.pairs, "seeds": args.seeds, "rate": args.rate, "curves": curves}
    Result.now("pretrained_pictures", figures).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
