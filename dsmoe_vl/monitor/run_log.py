"""Logs a run to TensorBoard, `metrics.jsonl` and the terminal, all three from the same numbers.

Only rank 0 writes. Values are means over a logging interval; nothing is read back from the accelerator in between.
A full disk does not stop training here: one line says what is missing. Lines of `metrics.jsonl` wait for space.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from dsmoe_vl.console import printable
from dsmoe_vl.monitor.board import Board, layer_tag, tag
from dsmoe_vl.monitor.metrics_file import MetricsFile
from dsmoe_vl.monitor.mirror import Mirror
from dsmoe_vl.monitor.router import draw_record
from dsmoe_vl.monitor.router_series import RouterSeries
from dsmoe_vl.monitor.samples import write_samples
from dsmoe_vl.monitor.symptoms import Watch
from dsmoe_vl.planner.plan import RunPlan

_BOARD = "TensorBoard's file"


class RunLog:
    """Writes on rank 0, does nothing on other ranks."""

    def __init__(self, plan: RunPlan, rank: int, first_step: int) -> None:
        self.enabled = rank == 0
        self.plan, self.steps = plan, plan.recipe.run.steps
        self._first_sparse_layer = plan.recipe.moe.first_dense_layers
        if not self.enabled:
            return
        self._metrics = MetricsFile(plan.run_dir / "metrics.jsonl", first_step)
        self._missing: set[str] = set()  # what could not be written and has been said
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._samples_at = first_step
        self._watch = Watch(plan.recipe, first_step)
        self._started = time.monotonic()
        self._first_step = first_step
        self._board: Board | None = None
        if plan.tensorboard_enabled:
            self.attempt(_BOARD, lambda: self._open_board(plan, first_step))
        self._mirror: Mirror | None = None
        if plan.mirrors:
            self._mirror = Mirror(plan)

    def say(self, text: str) -> None:
        """Print one line to standard output, with escapes for control characters of names."""
        if self.enabled:
            tqdm.write(printable(text, keep="\n\t"), file=sys.stdout)
            sys.stdout.flush()

    def attempt(self, what: str, write: Callable[[], None]) -> bool:
        """Call `write`, which writes `what`. If it raises an OSError, say so the first time; training goes on.

        Returns whether it was written.
        """
        try:
            write()
        except OSError as error:
            if self.enabled and what not in self._missing:
                self._missing.add(what)
                self.say(f"warning: {what} cannot be written: {error.strerror}; training goes on without it")
            return False
        return True

    def advance(self) -> None:
        """Advance the progress bar by one optimizer step."""
        if self.enabled and self._bar is not None:
            self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the values of an interval that ends with `step`."""
        if not self.enabled:
            return
        self._record(step, values)
        self._warn(step, values)
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
        self._warn(step, values)

    def log_router(self, series: RouterSeries | None) -> None:
        """Write the recorder's last record to TensorBoard: a picture, and aggregates of every layer."""
        if not self.enabled or series is None or (self._board is None and self._mirror is None):
            return
        step = int(series.step[-1])
        picture = np.asarray(draw_record(series, self._first_sparse_layer))
        aggregates = {
            layer_tag(layer, name): value
            for name, values in series.of_layers().items()
            for layer, value in enumerate(values[-1], self._first_sparse_layer)
        }
        self._picture("moe/load", picture, step)
        self._scalars(aggregates, step)

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
        if picture is not None:
            self._picture("samples", np.asarray(picture), step)

    def close(self) -> None:
        """Close the files."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.close()
        self._draw(lambda board: board.close())
        self._reflect(lambda mirror: mirror.close())
        self._metrics.close()

    def _warn(self, step: int, values: dict[str, float]) -> None:
        signs = self._watch.look(step, values)
        for sign in signs:
            self.say(f"warning at step {step}: {sign}")
        self._draw(lambda board: board.add_texts("warnings", signs, step))

    def _record(self, step: int, values: dict[str, float]) -> None:
        self.attempt("metrics.jsonl", lambda: self._metrics.write(step, values))
        self._scalars({tag(name): value for name, value in values.items()}, step)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        self._draw(lambda board: board.add_scalars(values, step))
        self._reflect(lambda mirror: mirror.add_scalars(values, step))

    def _picture(self, name: str, picture: np.ndarray, step: int) -> None:
        self._draw(lambda board: board.add_image(name, picture, step))
        self._reflect(lambda mirror: mirror.add_image(name, picture, step))

    def _open_board(self, plan: RunPlan, first_step: int) -> None:
        self._board = Board(plan, first_step)

    def _draw(self, draw: Callable[[Board], None]) -> None:
        """Write to TensorBoard. Its writer cannot go on after an error, so that is the last time."""
        board = self._board
        if board is not None and not self.attempt(_BOARD, lambda: draw(board)):
            self._board = None

    def _reflect(self, send: Callable[[Mirror], None]) -> None:
        """Give the mirrors what TensorBoard gets. They are programs of others: after an error of any kind training goes
        on without them."""
        if self._mirror is None:
            return
        try:
            send(self._mirror)
        except Exception as error:
            self._mirror = None
            names = ", ".join(self.plan.mirrors)
            self.say(f"warning: no more metrics go to {names}: {type(error).__name__}: {error}; training goes on")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
