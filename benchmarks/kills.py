"""Does a run that is killed again and again end as one that is not?

    python benchmarks/kills.py [--kills 50] [--recipe FILE] [--json FILE] [section.key=value ...]

A small model on the quickstart's shards saves after every step, in the background, and is killed (SIGKILL) at random
moments: some while steps are taken, most while files are written. The same command continues it. Every run that reaches
its end must have the losses and gradient norms of a run that was never killed, bit for bit; if not, this stops.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, Result
from run import DEEPSPEED

from dsmoe_vl.checkpoint.store import CHECKPOINTS_NAME, newest_complete

_SMALL = (
    "model.width=32", "model.heads=4", "model.kv_heads=2", "model.layers=2", "model.ffn_width=64",
    "model.vision.width=32", "model.vision.heads=2", "model.vision.layers=1", "model.vision.ffn_width=48",
    "moe.experts=4", "moe.ffn_width=32", "data.pack_length=256", "data.pack_patches=768", "data.workers=0",
    "run.steps=60", "run.evaluate_every=0", "run.evaluate_packs=1",
)  # fmt: skip
_ALWAYS = ("run.checkpoint_every=1", "run.samples_every=0", "run.log_every=1")
_LATEST = 0.6  # seconds after a step, at most


class Killed:
    """One run directory, and the command that trains it."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder = folder
        self.command = [
            sys.executable, str(ROOT / "launch/train.py"), "--deepspeed", str(args.deepspeed), "--recipe",
            str(args.recipe), "--run-dir", str(folder), *_SMALL, *args.overrides, *_ALWAYS,
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl; a line that is being written is left out."""
        file = self.folder / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]

    def curve(self) -> list[tuple[float, ...]]:
        """What must not differ."""
        return [tuple(line[name] for name in ("step", "loss", "grad_norm")) for line in self.lines() if "loss" in line]


def last_step(run: Killed) -> int:
    """The last one that is logged."""
    return max((line["step"] for line in run.lines()), default=0)


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is there that is not complete."""
    return any(not (one / "manifest.json").exists() for one in (folder / CHECKPOINTS_NAME).glob("step_*"))


def main() -> int:
    """Kill, continue, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--recipe", type=Path, default=ROOT / "launch/recipes/quickstart.toml")
    parser.add_argument("--deepspeed", type=Path, default=DEEPSPEED)
    parser.add_argument("--json", type=Path, help="write a result file (record.py)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_intermixed_args()
    moments = random.Random(args.seed)
    kills = in_saves = ends = losing = 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Killed(Path(folder, "whole"), args), Killed(Path(folder, "killed"), args)
        process = whole.start()
        out = process.communicate()[0]
        if process.returncode:
            raise SystemExit(out)
        while kills < args.kills or killed.folder.exists():
            process, before = killed.start(), last_step(killed)
            saved = newest_complete(killed.folder / CHECKPOINTS_NAME)
            while kills < args.kills and process.poll() is None and last_step(killed) <= before:
                time.sleep(0.01)
            time.sleep(moments.random() * _LATEST if kills < args.kills else 0)
            if kills < args.kills and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                in_saves += is_saving(killed.folder)
            out = process.communicate()[0]
            losing += saved is not None and f"resumed at step {saved[1].step}\n" not in out and "already" not in out
            if process.returncode == 0:
                if killed.curve() != whole.curve():
                    raise SystemExit(f"a run after {kills} kills differs from one without\n{out}")
                ends += 1
                shutil.rmtree(killed.folder)
            elif process.returncode != -signal.SIGKILL:
                raise SystemExit(out)
            print(f"kills {kills}, of these in a save {in_saves}; runs that ended as without {ends}", flush=True)
    figures = {
        "device": "cpu",
        "kills": kills,
        "kills_in_a_save": in_saves,
        "runs_that_ended_equal": ends,
        "complete_ones_not_used": losing,
    }
    if args.json:
        Result.now("kills", figures).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
