"""The scalars and pictures of a run in other programs too: Weights & Biases, Comet, CSV files.

DeepSpeed's monitors write them; their sections of the DeepSpeed JSON are the settings. TensorBoard stays the source:
the mirrors get what it gets, with the same tags and steps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.plan import RunPlan

_PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}


def require_packages(plan: RunPlan) -> None:
    """Raises ConfigError if a mirror's package is not installed."""
    for name in plan.mirrors:
        package = _PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise ConfigError(
                f"{name}.enabled = true in the DeepSpeed JSON, but {package} is not installed: `pip install {package}`"
            )


class Mirror:
    """The monitors that the JSON switches on, of the first rank."""

    def __init__(self, plan: RunPlan) -> None:
        """Starts them: an account that does not work ends the run here. Any error of a program of others may come from
        every method."""
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        sections = {name: dict(settings) for name, settings in plan.mirrors.items()}
        if "csv_monitor" in sections:  # beside the run's other files
            sections["csv_monitor"] = {"output_path": str(plan.run_dir), "job_name": "csv", **sections["csv_monitor"]}
        if "wandb" in sections:
            os.environ.setdefault("WANDB_NAME", plan.run_dir.name)
            os.environ.setdefault("WANDB_DIR", str(plan.run_dir))
        self._monitors = MonitorMaster(get_monitor_config(sections))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag."""
        self._monitors.write_events([(name, value, step) for name, value in values.items()])

    def add_image(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, uint8 [h, w, 3], where a program takes pictures."""
        wandb, comet = self._monitors.wandb_monitor, self._monitors.comet_monitor
        if wandb is not None:
            wandb.log({name: import_module("wandb").Image(picture)}, step=step)
        if comet is not None and comet.experiment is not None:
            comet.experiment.log_image(picture, name=name, step=step)

    def close(self) -> None:
        """Wait until all is written."""
        if self._monitors.wandb_monitor is not None:
            import_module("wandb").finish()
        comet = self._monitors.comet_monitor
        if comet is not None and comet.experiment is not None:
            comet.experiment.end()
