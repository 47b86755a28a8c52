"""Logs a run to TensorBoard, `metrics.jsonl` and the terminal, all three from the same numbers.

Only rank 0 writes. Values are means over a logging interval; nothing is read back from the accelerator in between.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dsmoe_vl.files import write_atomically
from dsmoe_vl.monitor.board import layer_tag, tag, write_layout, write_settings
from dsmoe_vl.monitor.router import draw_record
from dsmoe_vl.monitor.router_series import RouterSeries
from dsmoe_vl.monitor.samples import write_samples
from dsmoe_vl.monitor.symptoms import Watch
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.plan import RunPlan


class RunLog:
    """Writes on rank 0, does nothing on other ranks."""

    def __init__(self, plan: RunPlan, rank: int, first_step: int) -> None:
        self.enabled = rank == 0
        self.plan, self.steps = plan, plan.recipe.run.steps
        self._first_sparse_layer = plan.recipe.moe.first_dense_layers
        if not self.enabled:
            return
        self._metrics = _open_at(plan.run_dir / "metrics.jsonl", first_step)
        self._writer: SummaryWriter | None = None
        if plan.tensorboard_enabled:
            self._writer = SummaryWriter(str(plan.tensorboard_dir), purge_step=first_step + 1 if first_step else None)
            self._writer.add_text("plan", "```\n" + describe(plan) + "\n```", first_step)
            write_layout(self._writer, plan)
            write_settings(self._writer, plan)
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._samples_at = first_step
        self._watch = Watch(plan.recipe, first_step)
        self._started = time.monotonic()
        self._first_step = first_step

    def say(self, text: str) -> None:
        """Print one line to standard output."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """Advance the progress bar by one optimizer step."""
        if self.enabled and self._bar is not None:
            self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the values of an interval that ends with `step`."""
        if not self.enabled:
            return
        self._record(step, values)
        for sign in self._watch.look(step, values):
            self.say(f"warning at step {step}: {sign}")
            if self._writer is not None:
                self._writer.add_text("warnings", sign, step)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s")
            if sys.stdout.isatty():
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

    def log_router(self, series: RouterSeries | None) -> None:
        """Write the recorder's last record to TensorBoard: a picture, and aggregates of every layer."""
        if not self.enabled or series is None or self._writer is None:
            return
        step = int(series.step[-1])
        picture = np.asarray(draw_record(series, self._first_sparse_layer))
        self._writer.add_image("moe/load", picture, step, dataformats="HWC")
        for name, values in series.of_layers().items():
            for layer, value in enumerate(values[-1], self._first_sparse_layer):
                self._writer.add_scalar(layer_tag(layer, name), value, step)

    def log_samples(self, step: int) -> None:
        """Run the checkpoint of `step` on held-out samples, if enough steps have passed since the last time."""
        if not self.enabled or not self.plan.recipe.run.samples_every or not self.plan.recipe.data.evaluation:
            return
        if step - self._samples_at < self.plan.recipe.run.samples_every and step != self.steps:
            return
        self._samples_at = step
        try:
            picture = write_samples(self.plan.run_dir, self.plan.recipe, self.plan.device, step)
        except Exception as error:  # no error here may stop training
            self.say(f"no samples at step {step}: {type(error).__name__}: {error}")
            return
        if picture is not None and self._writer is not None:
            self._writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        self._metrics.close()

    def _record(self, step: int, values: dict[str, float]) -> None:
        # Nine digits distinguish any two fp32 numbers.
        short = {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in values.items()}
        self._metrics.write(json.dumps({"step": step, **short}) + "\n")
        self._metrics.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(tag(name), value, step)


def _open_at(path: Path, first_step: int) -> Any:
    """Open the metrics file for appending, without the lines of steps that a resumed run takes again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # a line cut short by a crash
        write_atomically(path, "".join(kept))
    return path.open("a")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
