"""Draws the routing of a run: `python -m dsmoe_vl.monitor.router runs/NAME [--output out.png]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dsmoe_vl.checkpoint.store import PLAN_NAME
from dsmoe_vl.command import run
from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.console import tell
from dsmoe_vl.data.segment import Modality
from dsmoe_vl.drawing.heatmap import Panel, load_scale, rising_scale, sheet
from dsmoe_vl.drawing.picture_file import format_of, save_picture
from dsmoe_vl.monitor.router_series import FILE, RouterSeries

_TIMES = 96  # columns of a panel over time, at most
_LAYERS_OVER_TIME = 8  # layers with their own panel, evenly chosen if there are more


def draw_record(series: RouterSeries, first_layer: int) -> Image.Image:
    """The last record: layers x experts, for all tokens, every task and every modality with tokens, and gate weights.
    first_layer: number of the first decoder layer with experts."""
    last = series.rows(slice(-1, None))
    steps = f"steps {last.step[0] - last.steps[0] + 1} to {last.step[0]}"
    return sheet(f"router load, {steps}", [[*_load_panels(last, first_layer), _gate_panel(last, first_layer)]])


def draw_run(series: RouterSeries, first_layer: int) -> Image.Image:
    """The whole run: the last record, every layer's experts over time, and the layers' aggregates over time."""
    last = series.rows(slice(-1, None))
    layers = _layer_names(series, first_layer)
    # Old records cover more steps than new ones: take evenly spaced steps, and draw the record of each.
    steps = np.linspace(series.step[0] - series.steps[0] + 1, series.step[-1], min(len(series), _TIMES))
    times = series.rows(np.searchsorted(series.step, np.floor(steps)))
    ends = (str(times.step[0] - times.steps[0] + 1), str(times.step[-1]))
    load = times.relative_load()
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), _LAYERS_OVER_TIME)).astype(int))
    over_time = [
        Panel(
            f"layer {layers[n]}: experts over time", load[:, n, : series.experts[n]].T, load_scale(),
            [str(e) for e in range(series.experts[n])], ends, "step",
        )
        for n in chosen
    ]  # fmt: skip
    found = times.of_layers()
    tops = {
        "max_violation": max(1.0, float(found["max_violation"].max())),
        "dead_fraction": 1.0,
        "entropy": float(np.log(series.experts.max())),
        "drop_fraction": 1.0,
    }
    aggregates = [
        Panel(
            name.replace("_", " "), found[name].T, rising_scale(name.replace("_", " "), top), layers, ends, "step"
        )
        for name, top in tops.items()
        if name != "drop_fraction" or found[name].any()
    ]  # fmt: skip
    title = f"routers, steps {ends[0]} to {ends[1]}; loads and gates of the last {last.steps[0]} steps"
    blocks = [[*_load_panels(last, first_layer), _gate_panel(last, first_layer)], over_time, aggregates]
    return sheet(title, blocks)


def _load_panels(last: RouterSeries, first_layer: int) -> list[Panel]:
    views = {"all tokens": last.relative_load()[0]}
    by_task, by_modality = last.relative_load((3,))[0], last.relative_load((2,))[0]
    views |= {f"task {spec.name}": values for spec, values in zip(TASKS, by_task.swapaxes(0, 1), strict=False)}
    views |= {
        f"modality {modality.name.lower()}": values
        for modality, values in zip(Modality, by_modality.swapaxes(0, 1), strict=False)
    }
    layers, ends = _layer_names(last, first_layer), ("0", str(int(last.experts.max()) - 1))
    return [
        Panel(title, values, load_scale(), layers, ends, "expert")
        for title, values in views.items()
        if np.isfinite(values).any()
    ]


def _gate_panel(last: RouterSeries, first_layer: int) -> Panel:
    counts = last.gates[0].astype(np.float64)
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    scale = rising_scale("share of assignments", 0.5)
    return Panel("gate weights", shares, scale, _layer_names(last, first_layer), ("0", "1"), "gate")


def _layer_names(series: RouterSeries, first_layer: int) -> list[str]:
    return [str(first_layer + index) for index in range(len(series.experts))]


def main() -> int:
    """Exit status: 0 if drawn, 2 for a user's error."""
    parser = argparse.ArgumentParser(description="Draw the routing of a run.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, such as runs/quickstart")
    parser.add_argument("--output", type=Path, help="the picture (default: RUN/router.png)")
    args = parser.parse_args()
    return run(lambda: _draw(args.run, args.output or args.run / "router.png"))


def _draw(run_dir: Path, output: Path) -> int:
    form = format_of(output, "--output")
    series = RouterSeries.load_from(run_dir / FILE)
    first_layer = _first_layer(run_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_picture(draw_run(series, first_layer), output, form)
    tell(str(output))
    return 0


def _first_layer(run_dir: Path) -> int:
    from dsmoe_vl.planner.plan import recipe_from_json

    return recipe_from_json(run_dir / PLAN_NAME).moe.first_dense_layers


if __name__ == "__main__":
    sys.exit(main())
