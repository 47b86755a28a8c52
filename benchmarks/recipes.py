"""What a shipped recipe comes to: scores on held-out scenes, time, tokens a second.

    python benchmarks/recipes.py {quickstart,three_tasks,speech} [--json FILE]    (5, 17 and 25 minutes on two cores)
    python benchmarks/recipes.py NAME --run runs/NAME [--log FILE] [--commit COMMIT] [--json FILE]

Runs the commands that train and evaluate the recipe (three_tasks needs the quickstart's shards; speech those that its
file names), or takes a run that they have made on this machine; `--log` is what they printed. A run does not know its
commit: without --commit none is recorded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from itertools import dropwhile
from pathlib import Path
from typing import Any

from record import ROOT, Result
from run import Run

COMMANDS = {
    "quickstart": ("bash launch/quickstart.sh",),
    **{
        name: (
            "deepspeed --num_accelerators 2 launch/train.py --deepspeed ds_configs/moe.json "
            f"--recipe launch/recipes/{name}.toml",
            f"python launch/evaluate.py --run runs/{name}",
        )
        for name in ("three_tasks", "speech")
    },
}


def carry_out(command: str) -> list[str]:
    """Run a command in the repository, with this Python's programs first; shows what it prints, and returns the lines.

    Raises SystemExit with its status if it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    lines = []
    with subprocess.Popen(
        command, shell=True, cwd=ROOT, env={**os.environ, "PATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        raise SystemExit(process.returncode)
    return lines


def figures_of(run: Run, lines: list[str], seconds: float | None) -> dict[str, Any]:
    """From eval.json, metrics.jsonl and plan.json of an evaluated run, and from what its commands printed.

    `seconds`: of all commands; those of the steps alone are added up from metrics.jsonl.
    """
    plan, logged = run.plan(), [line for line in run.metrics() if "step_ms" in line]
    steps = [line["step"] for line in logged]
    lengths = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    return {
        "parameters": plan["parameters"]["total"],
        "active_parameters": plan["parameters"]["active"],
        **{name: plan[name] for name in ("device", "ep_size", "zero_stage", "precision")},
        "ranks": plan["world_size"],
        "steps": steps[-1],
        "seconds": seconds,
        "step_seconds": sum(n * line["step_ms"] for n, line in zip(lengths, logged, strict=True)) / 1e3,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in logged),
        "real_tokens": sum(n * line["real_tokens"] for n, line in zip(lengths, logged, strict=True)) / steps[-1],
        "scores": run.evaluate(),
        # From the first step on, without the dated lines of DeepSpeed.
        "output": [line for line in dropwhile(lambda line: not line.startswith("step "), lines) if line[:1] != "["],
    }


def main() -> int:
    """Train and evaluate, or take a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=COMMANDS)
    parser.add_argument("--run", type=Path, help="an evaluated run, instead of training one")
    parser.add_argument("--log", type=Path, help="what the commands of --run printed")
    parser.add_argument("--commit", help="the commit with which --run was trained")
    parser.add_argument("--json", type=Path, help="write a result file (record.py)")
    args = parser.parse_args()
    commands = COMMANDS[args.recipe]
    run = Run(args.run or ROOT / "runs" / args.recipe, ROOT / f"launch/recipes/{args.recipe}.toml")
    seconds, lines = None, args.log.read_text().splitlines() if args.log else []
    if not args.run:
        if run.folder.exists():
            raise SystemExit(f"{run.folder} is there: take it with --run, or delete it to train anew")
        started = time.perf_counter()
        lines = [line for command in commands for line in carry_out(command)]
        seconds = time.perf_counter() - started
    result = Result.now(args.recipe, figures_of(run, lines, seconds), " && ".join(commands))
    if args.run:
        date = datetime.fromtimestamp((run.folder / "eval.json").stat().st_mtime, UTC).isoformat(timespec="seconds")
        result = replace(result, commit=args.commit, date=date)
    for name, value in result.figures.items():
        if name != "output":
            print(f"{name:20} {value}")
    if args.json:
        result.write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
