"""What do real weights bring on real pictures? Retrieval from them, from nothing and over frozen features.

    python benchmarks/pretrained_pictures.py --pictures DIR [--pairs 12000] [--seeds 1] [--jobs 2] [--json FILE]

DIR is as learning.py takes it; all ways see as many pairs. From real weights: DINOv2-small and SmolLM2-135M with
experts made of its feed-forwards, projections trained over their states, which launch/whiten.py has whitened
(pretrained_pictures.toml; needs what `bash launch/pretrained.sh` makes). From nothing: the small model of learning.py.
Frozen: features of DINOv2-small as transformers computes them, a small network over them, and one over a bag of words
and trigrams. A pair takes some 12 GFLOP with real weights, so there are fewer than in learning.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning import SCORES, learn, settings
from learning_run import FROZEN, PRETRAINED, REAL
from record import RESULTS, ROOT, Result

NOTHING = "retrieval"
_TITLES = {REAL: "from real weights", NOTHING: "from nothing", FROZEN: FROZEN}


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
    whitened = args.shards / pictures.name / "whitened"
    if not whitened.exists():
        command = [
            sys.executable,
            "launch/whiten.py",
            "--recipe",
            PRETRAINED,
            "--output",
            whitened,
            "--pairs",
            3000,
            *sources,
        ]
        subprocess.run(list(map(str, command)), check=True)
    own = {REAL: f"model.init_from={whitened}"}  # with a tokenizer of its own
    runs = [(variant, seed) for seed in args.seeds for variant in _TITLES]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda run: learn(*run, args, (*sources, own.get(run[0], tokenizer))), runs)
        points = dict(zip(runs, found, strict=True))
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
