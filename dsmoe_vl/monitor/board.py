"""TensorBoard layout of a run: tags, charts, and the settings to compare runs by."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dsmoe_vl.config.recipe import learned_tasks
from dsmoe_vl.files import writing
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan

# Names in metrics.jsonl have no prefix; TensorBoard groups by prefix.
_GROUPS = {
    "loss": "train", "lr": "train", "grad_norm": "train", "skipped_steps": "train",
    "balance_loss": "moe", "z_loss": "moe", "max_violation": "moe", "max_violation_micro": "moe",
    "dead_fraction": "moe", "entropy": "moe", "drop_fraction": "moe", "mutual_information": "moe",
    "local_entropy_loss": "moe", "global_entropy_loss": "moe", "mutual_information_loss": "moe",
    "omega": "sparsity", "zero_fraction": "sparsity", "zero_fraction_experts": "sparsity",
    "tokens_per_second": "perf", "tflops": "perf", "mfu": "perf", "step_ms": "perf", "data_wait_ms": "perf",
    "forward_ms": "perf", "backward_ms": "perf", "optimizer_ms": "perf",
    "rss_gib": "memory", "allocated_gib": "memory", "allocated_peak_gib": "memory", "reserved_peak_gib": "memory",
    "real_tokens": "data", "bad_samples": "data",
}  # fmt: skip


def tag(name: str) -> str:
    """`loss_caption` -> `train/loss_caption`, `grad_norm_vision` -> `gradients/vision`, `eval_loss` -> `eval/loss`."""
    if name.startswith("eval_"):
        return "eval/" + name.removeprefix("eval_")
    if name.startswith("grad_norm_"):
        return "gradients/" + name.removeprefix("grad_norm_")
    if name.startswith(("loss_", "weight_")):
        return "train/" + name
    return f"{_GROUPS.get(name, 'data')}/{name}"


def layer_tag(layer: int, name: str) -> str:
    """The tag of a decoder layer's aggregate."""
    return f"moe/layer_{layer:02d}/{name}"


class Board:
    """The event file of a run. Its thread writes later, so an OSError may be raised by any call after the one at fault.

    After an OSError nothing more can be written.
    """

    def __init__(self, plan: RunPlan, first_step: int) -> None:
        """Write the plan, the charts and the settings."""
        _keep_thread_quiet()
        with writing(Path(plan.tensorboard_dir)):
            self._writer = SummaryWriter(str(plan.tensorboard_dir), purge_step=first_step + 1 if first_step else None)
            self._writer.add_text("plan", "```\n" + describe(plan) + "\n```", first_step)
            write_layout(self._writer, plan)
            write_settings(self._writer, plan)

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def add_image(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, uint8 [h, w, 3]."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def add_texts(self, name: str, texts: Sequence[str], step: int) -> None:
        """Texts in Markdown."""
        for text in texts:
            self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()


def _keep_thread_quiet() -> None:
    """Do not print the OSErrors of TensorBoard's thread: it keeps them for the next call, which raises them."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        module = "" if args.thread is None else type(args.thread).__module__
        if not (module.startswith("tensorboard") and isinstance(args.exc_value, OSError)):
            before(args)

    threading.excepthook = hook


def write_layout(writer: SummaryWriter, plan: RunPlan) -> None:
    """Write the charts of the tab Custom Scalars: learning, speed, experts, sparsity and data."""
    terms = [f"loss_{term.name}" for task in learned_tasks(plan.recipe) for term in task.terms]

    def lines(*names: str) -> list[Any]:
        return ["Multiline", [tag(name) for name in names]]

    # The peak rate of a CPU is unknown.
    rate = {"share of the peak rate": lines("mfu")} if plan.device == "cuda" else {"TFLOP a second": lines("tflops")}
    learned = plan.recipe.objective.task_weights.method != "fixed"
    weights = (
        {"weight of every task": lines(*(f"weight_{t.name}" for t in learned_tasks(plan.recipe)))} if learned else {}
    )
    layout: dict[str, dict[str, list[Any]]] = {
        "is it learning": {
            "loss of every task": lines(*terms),
            "held-out loss of every task": lines(*(f"eval_{term}" for term in terms)),
            "loss, all in all": lines("loss", "eval_loss"),
            **weights,
            "learning rate": lines("lr"),
            "gradient norm": lines("grad_norm"),
            "skipped steps": lines("skipped_steps"),
            "gradient norm by part": lines(*(f"grad_norm_{part}" for part in plan.trained.parts)),
        },
        "is it fast": {
            "tokens a second": lines("tokens_per_second"),
            **rate,
            "milliseconds of a step": lines("step_ms", "data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms"),
            "memory, GiB": ["Multiline", ["memory/.*"]],
        },
    }
    if experts_of_layers(plan.recipe):
        layout["are the experts alive"] = {
            "busiest expert over an even share, less 1": lines("max_violation", "max_violation_micro"),
            "dead experts": lines("dead_fraction"),
            "entropy of a token's routing, nats": lines("entropy"),
            "entropy of every layer": ["Multiline", [r"moe/layer_\d+/entropy"]],
            "max violation of every layer": ["Multiline", [r"moe/layer_\d+/max_violation"]],
            "dropped assignments": lines("drop_fraction"),
            "balance loss": lines("balance_loss"),
        }
    if plan.recipe.objective.l1.weight:
        layout["is it sparse"] = {
            "exact zeros": lines("zero_fraction", "zero_fraction_experts"),
            "Omega": lines("omega"),
        }
    layout["how is the data"] = {
        "samples of every source": ["Multiline", ["data/.*/samples"]],
        "errors of every source": ["Multiline", ["data/.*/errors"]],
        "real tokens of a pack": lines("real_tokens"),
    }
    writer.add_custom_scalars(layout)


def write_settings(writer: SummaryWriter, plan: RunPlan) -> None:
    """Write the tab HParams: settings that differ between runs, and the values to compare them by."""
    recipe, parameters = plan.recipe, plan.deepspeed.get("optimizer", {}).get("params", {})
    settings = {
        "lr": parameters.get("lr"),
        "weight_decay": parameters.get("weight_decay"),
        "tokens_per_step": plan.tokens_per_step,
        "world_size": plan.world_size,
        "ep_size": plan.ep_size,
        "zero_stage": plan.zero_stage,
        "precision": plan.precision,
        "seed": recipe.run.seed,
        "steps": recipe.run.steps,
        "parameters": plan.parameters.total,
        "active_parameters": plan.parameters.active,
        "model.width": recipe.model.width,
        "model.layers": recipe.model.layers,
        "objective.l1.weight": recipe.objective.l1.weight,
        **{
            f"moe.{name}": getattr(recipe.moe, name)
            for name in (
                "backend",
                "routing",
                "experts",
                "top_k",
                "ffn_width",
                "balance_weight",
                "z_weight",
                "bias_rate",
            )
        },
        **{f"tasks.{task.name}.weight": getattr(recipe.tasks, task.name).weight for task in learned_tasks(recipe)},
    }
    compared = ("loss", "eval_loss", "tokens_per_second", "max_violation")
    known = {name: value for name, value in settings.items() if value is not None}
    # Into the run's own event file: SummaryWriter.add_hparams would create another run.
    for summary in hparams(known, {tag(name): 0.0 for name in compared}):
        writer._get_file_writer().add_summary(summary)
