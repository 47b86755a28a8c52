"""How fast does it learn real pictures: each task alone, together, dense, and beside a plain dual encoder?

    python benchmarks/learning.py [--pictures DIR] [--seeds 1 2 3] [--jobs 1] [--plot FILE]

Every variant of learning_run.py sees as many pairs, in a process of its own on one core: curves of R@1 in both
directions and of exact captions over pairs and over CPU seconds. Writes benchmarks/results/learning.json. With `--jobs`
above 1 the CPU seconds are not those of an idle machine. Variants that are not named keep their curves of the result
file, if it is of the same pictures, seeds and rate. The plot needs matplotlib (the extra "compare").

DIR has pictures with train.csv and test.csv (columns file, text, content), as `python -m data_tools.convert folder`
reads them. Without it: the quickstart's pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from learning_run import DUAL_ENCODER, VARIANTS
from record import RESULTS, ROOT, Result

_SCENES = ("data/synthetic/images_train", "data/synthetic/images_eval", "data/synthetic/tokenizer.model")
_VOCABULARY = 1500
SCORES = {
    "text_to_media_r1": "text to picture, R@1",
    "media_to_text_r1": "picture to text, R@1",
    "captions": "exact captions",
}

Point = dict[str, Any]


def settings(pictures: Path | None, shards: Path) -> tuple[str, ...]:
    """Overrides of learning.toml for the data. Makes shards and a tokenizer of a folder of pictures once."""
    if pictures and not all((pictures / f"{part}.csv").is_file() for part in ("train", "test")):
        raise SystemExit(f"--pictures {pictures}: needs train.csv and test.csv")
    train, test, tokenizer = _SCENES if pictures is None else (shards / "train", shards / "test", shards / "t.model")
    for part, folder in (("train", train), ("test", test)) if pictures else ():
        if not (Path(folder) / "index.json").exists():
            _tool("convert", "folder", "--media", pictures, "--table", pictures / f"{part}.csv", "--output", folder)
    if pictures and not Path(tokenizer).exists():
        _tool("tokenizer", "train", "--data", train, "--vocab-size", _VOCABULARY, "--output", tokenizer)
    sources = {"data.sources": train, "data.evaluation": test}
    overrides = [f'{key}=[{{name="pictures", path="{path}"}}]' for key, path in sources.items()]
    return (*overrides, f"tokenizer.path={tokenizer}")


def _tool(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", f"data_tools.{name}", *map(str, arguments)], cwd=ROOT, check=True)


def learn(variant: str, seed: int, args: argparse.Namespace, overrides: tuple[str, ...]) -> list[Point]:
    """The curve of one process. Raises CalledProcessError."""
    command = [
        sys.executable, str(ROOT / "benchmarks/learning_run.py"), variant, "--seed", str(seed), "--pairs",
        str(args.pairs), "--rate", str(args.rate), "--points", str(args.points), *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    points = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last = ", ".join(f"{SCORES[name]} {100 * points[-1][name]:.1f} %" for name in SCORES if name in points[-1])
    print(f"{variant}, seed {seed}: {points[-1]['pairs']} pairs, {points[-1]['seconds']:.0f} CPU s: {last}", flush=True)
    return points


def draw(curves: dict[str, list[list[Point]]], file: Path) -> None:
    """Means and ranges of the seeds, over pairs above and over CPU seconds below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = {score for seeds in curves.values() for score in seeds[0][0]}
    titles = {score: title for score, title in SCORES.items() if score in measured}
    figure, rows = pyplot.subplots(2, len(titles), figsize=(4.4 * len(titles), 7), dpi=110, squeeze=False)
    for row, (over, label) in zip(rows, (("pairs", "pairs seen"), ("seconds", "CPU seconds")), strict=True):
        for axes, (score, title) in zip(row, titles.items(), strict=True):
            for variant, seeds in curves.items():
                by_point = list(zip(*seeds, strict=True))
                if score not in by_point[0][0]:
                    continue
                at = [statistics.fmean(point[over] for point in points) for points in by_point]
                values = [[100 * point[score] for point in points] for points in by_point]
                (line,) = axes.plot(at, [statistics.fmean(v) for v in values], marker="o", ms=3, label=variant)
                axes.fill_between(at, [*map(min, values)], [*map(max, values)], color=line.get_color(), alpha=0.2)
            axes.set_xlabel(label)
            axes.set_ylabel(f"{title}, %")
            axes.grid(alpha=0.3)
    for axes in rows[0]:
        axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="pictures with train.csv and test.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--pairs", type=int, default=66_000, help="pairs that each variant sees")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate of the trainer's variants")
    known = [*VARIANTS, DUAL_ENCODER]
    parser.add_argument("--variants", nargs="+", default=known, choices=known)
    parser.add_argument("--points", type=int, default=6, help="points of each curve")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, a core each")
    parser.add_argument(
        "--shards", type=Path, default=Path("data/learning"), help="where DIR's shards are kept, by its name"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the curves, such as to docs/images/learning.png"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "learning.json", help="the result file")
    args = parser.parse_args()
    pictures = args.pictures and args.pictures.resolve()
    os.chdir(ROOT)  # where the recipes' paths begin
    overrides = settings(pictures, args.shards / pictures.name if pictures else args.shards)
    runs = [(variant, seed) for seed in args.seeds for variant in args.variants]  # variants interleaved
    with ThreadPoolExecutor(args.jobs) as pool:
        points = list(pool.map(lambda run: learn(*run, args, overrides), runs))
    found = dict(zip(runs, points, strict=True))
    new = {variant: [found[variant, seed] for seed in args.seeds] for variant in args.variants}
    of = pictures.name if pictures else "the quickstart's pictures"
    what = {"pictures": of, "seeds": args.seeds, "rate": args.rate}
    before = Result.read(args.json).figures if args.json.exists() else {}
    old = before["curves"] if what.items() <= before.items() else {}
    curves = {variant: (old | new)[variant] for variant in known if variant in old | new}
    figures = {**what, "curves": curves}
    Result.now("learning", figures).write(args.json)
    if args.plot:
        draw(curves, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
