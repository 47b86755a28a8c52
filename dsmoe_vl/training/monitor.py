"""What the user sees of a run: TensorBoard, `metrics.jsonl` and the terminal, all three from the same numbers.

Only rank 0 writes. Values are averaged over the steps since the last line; nothing is read back from the accelerator in
between.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dsmoe_vl.config.describe import describe
from dsmoe_vl.config.plan import RunPlan

# metrics.jsonl names a value plainly; TensorBoard groups by prefix.
_GROUPS = {
    "loss": "train", "lr": "train", "grad_norm": "train",
    "balance_loss": "moe", "z_loss": "moe", "max_violation": "moe", "dead_fraction": "moe", "entropy": "moe",
    "drop_fraction": "moe", "mutual_information": "moe", "local_entropy_loss": "moe", "global_entropy_loss": "moe",
    "mutual_information_loss": "moe",
    "omega": "sparsity", "zero_fraction": "sparsity", "zero_fraction_experts": "sparsity",
    "tokens_per_second": "perf", "step_ms": "perf", "data_wait_ms": "perf", "tflops": "perf",
    "real_tokens": "data", "bad_samples": "data",
}  # fmt: skip


class Monitor:
    """Writes on rank 0, does nothing elsewhere."""

    def __init__(self, plan: RunPlan, rank: int, first_step: int) -> None:
        self.enabled = rank == 0
        self.steps = plan.recipe.run.steps
        if not self.enabled:
            return
        self._metrics = _open_at(plan.run_dir / "metrics.jsonl", first_step)
        self._writer: SummaryWriter | None = None
        if plan.tensorboard_enabled:
            self._writer = SummaryWriter(str(plan.tensorboard_dir), purge_step=first_step + 1 if first_step else None)
            self._writer.add_text("plan", "```\n" + describe(plan) + "\n```", first_step)
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._started = time.monotonic()
        self._first_step = first_step

    def say(self, text: str) -> None:
        """One line to the terminal or the log."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.enabled and self._bar is not None:
            self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the values of an interval that ends with `step`."""
        if not self.enabled:
            return
        self._record(step, values)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}")
            return
        done = step - self._first_step
        remaining = (time.monotonic() - self._started) / max(done, 1) * (self.steps - step)
        self.say(
            f"step {step}/{self.steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad_norm {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tokens/s  "
            f"data wait {100 * values['data_wait_ms'] / values['step_ms']:.1f} %  {_clock(remaining)} left"
        )

    def log_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Record held-out values; names begin with `eval_`."""
        if not self.enabled:
            return
        self._record(step, values)
        self.say(f"step {step}/{self.steps}  held-out  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def close(self) -> None:
        """Flush everything."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        self._metrics.close()

    def _record(self, step: int, values: dict[str, float]) -> None:
        # Nine digits tell any two fp32 numbers apart.
        short = {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in values.items()}
        self._metrics.write(json.dumps({"step": step, **short}) + "\n")
        self._metrics.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(_tag(name), value, step)


def _tag(name: str) -> str:
    """`loss_caption` -> `train/loss_caption`, `eval_loss_caption` -> `eval/loss_caption`."""
    if name.startswith("eval_"):
        return "eval/" + name.removeprefix("eval_")
    if name.startswith("loss_"):
        return "train/" + name
    return f"{_GROUPS.get(name, 'data')}/{name}"


def _open_at(path: Path, first_step: int) -> Any:
    """The metrics file for appending, without the lines of steps that a resumed run will take again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # a line cut short by a crash
        path.write_text("".join(kept))
    return path.open("a")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
