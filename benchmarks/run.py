"""A training run of a benchmark: trained by launch/train.py, scored by launch/evaluate.py, read from its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import ROOT

DEEPSPEED = ROOT / "ds_configs/moe.json"


@dataclass(frozen=True)
class Run:
    """One training run and where it is kept."""

    folder: Path
    recipe: Path
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    deepspeed: Path = DEEPSPEED

    def train(self) -> None:
        """Train, or continue, or do nothing where it is done. Raises CalledProcessError."""
        command = [str(ROOT / "launch/train.py"), "--deepspeed", str(self.deepspeed), "--recipe", str(self.recipe)]
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(self.ranks)]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as log:
            subprocess.run(
                [*launcher, *command, "--run-dir", str(self.folder), *self.overrides],
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True,
            )  # fmt: skip

    def evaluate(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores by folder of shards and task, as launch/evaluate.py finds them."""
        scores = self.folder / "eval.json"
        if not scores.exists():
            subprocess.run(
                [sys.executable, str(ROOT / "launch/evaluate.py"), "--run", str(self.folder)],
                cwd=ROOT, stdout=subprocess.DEVNULL, check=True,
            )  # fmt: skip
        return {Path(folder).name: found for folder, found in json.loads(scores.read_text()).items()}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def plan(self) -> dict[str, Any]:
        """plan.json."""
        found: dict[str, Any] = json.loads((self.folder / "plan.json").read_text())
        return found
