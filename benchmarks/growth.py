"""How a step's time and memory grow with the pack, the experts, the pictures and the frames.

    python benchmarks/growth.py [--curves NAME ...] [--rounds 3] [--steps 3] [--json FILE] [--plot FILE]

The quickstart's model on one CPU rank of one thread, on random packs. Beside each curve stands the order that is
expected: FLOPs, which count K of E experts and attention inside of segments alone. Times are the processor's, so that
other work on the machine counts less, and all points take turns, so that a machine whose speed changes slows down all
of them. Eleven minutes on two cores. The plot needs matplotlib (the extra "compare").
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Result

from dsmoe_vl.doctor.calibration import small_plan
from dsmoe_vl.doctor.timed_step import time_steps
from dsmoe_vl.planner.flops import estimate_flops

_TEXT = 10  # tokens of a random caption


@dataclass(frozen=True)
class Point:
    """A configuration of a curve: overrides of the recipe quickstart."""

    at: int
    overrides: tuple[str, ...] = ()
    frames: int = 0


CURVES: dict[str, tuple[Point, ...]] = {
    "tokens of a pack": tuple(
        Point(768 * n, (f"data.pack_length={768 * n}", f"data.pack_patches={2304 * n}")) for n in (1, 2, 4, 8)
    ),
    "experts, 2 a token": tuple(Point(n, (f"moe.experts={n}",)) for n in (4, 8, 16, 32, 64)),
    "patches of a picture, in packs of 1,536 tokens": tuple(
        Point(n, (f"data.image_max_patches={n}", "data.pack_length=1536", "data.pack_patches=4608"))
        for n in (16, 64, 256, 1024)
    ),
    "frames of a video, in packs of 1,536 tokens": tuple(
        Point(n, ("data.pack_length=1536", "data.pack_patches=4608"), frames=n) for n in (1, 4, 16, 64)
    ),
}  # fmt: skip


def measure(point: Point, steps: int) -> dict[str, float]:
    """Seconds and MiB of a step, and its expected cost: FLOPs of a rank."""
    plan = small_plan(
        list(point.overrides), 1, 1, expert_parallel={"enabled": True, "autoep_size": 1},
    )  # fmt: skip
    timed = time_steps(plan, steps, point.frames)
    data, merge = plan.recipe.data, plan.recipe.model.vision.merge
    picture = data.frame_max_patches if point.frames else data.image_max_patches
    segment = (point.frames or 1) * picture / merge**2 + _TEXT
    flops = estimate_flops(plan.recipe, token_context=segment / 2, patch_context=picture)
    return {
        "at": point.at, "seconds": timed.processor_seconds,
        "peak_mib": timed.peak_bytes / 2**20, "tokens": timed.tokens, "patches": timed.patches,
        "expected": flops.training(timed.tokens, timed.patches, timed.labels),
    }  # fmt: skip


def together(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """A point of several rounds: the median time and memory, and the least and the greatest time."""
    middle = {key: statistics.median(one[key] for one in rounds) for key in ("seconds", "peak_mib")}
    seconds = [one["seconds"] for one in rounds]
    return {**rounds[0], **middle, "seconds_spread": [min(seconds), max(seconds)]}


def draw(curves: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Times of the first point, measured and expected."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.4 * len(curves), 3.4), dpi=100)
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        for key, style in (("expected", {"ls": "--", "color": "0.6"}), ("seconds", {"marker": "o"})):
            values = [point[key] / points[0][key] for point in points]
            label = {"expected": "FLOPs", "seconds": "time"}[key]
            axis.plot([point["at"] for point in points], values, label=label, **style)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0)
        axis.set_xticks([point["at"] for point in points], [f"{point['at']:,}" for point in points])
        axis.set_xlabel(name.partition(", in")[0])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times the first point")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="of each point in a round; the median counts")
    parser.add_argument("--rounds", type=int, default=3, help="in which all points take turns; the median counts")
    parser.add_argument(
        "--curves", nargs="+", choices=CURVES, default=[*CURVES], metavar="NAME", help="; ".join(CURVES)
    )
    parser.add_argument("--points", type=int, help="only so many of each curve")
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    parser.add_argument("--plot", type=Path, help="draw docs/images/growth.png")
    args = parser.parse_args()
    points = {name: CURVES[name][: args.points] for name in args.curves}
    rounds = []
    for number in range(1, args.rounds + 1):
        rounds.append({name: [measure(point, args.steps) for point in of_curve] for name, of_curve in points.items()})
        print(f"round {number} of {args.rounds}", flush=True)
    found = {
        name: [together(list(point)) for point in zip(*(one[name] for one in rounds), strict=True)] for name in points
    }
    for name, curve in found.items():
        for point in curve:
            print(
                f"{name}: {point['at']:,}: {point['seconds']:.3f} s ({point['seconds_spread'][0]:.3f} to "
                f"{point['seconds_spread'][1]:.3f}), {point['seconds'] / curve[0]['seconds']:.2f} times the first, "
                f"{point['expected'] / curve[0]['expected']:.2f} expected; {point['peak_mib']:.0f} MiB"
            )
    if args.plot:
        draw(found, args.plot)
    if args.json:
        Result.now("growth", {"rounds": args.rounds, "steps": args.steps, "curves": found}).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
