"""Tables of docs/scaling.md: the planner beside measurements and published speeds, and what it says of clusters."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import Results, Table, block, newest


def published(results: Results) -> str:
    """Speeds of other trainers beside the planner's."""
    table = Table("point", "GPUs", "published, TFLOP/s a GPU", "predicted", "error", "left out", "from")
    result = newest(results, "published")
    if result is None:
        table.unverified("published", "all points")
        return block(table)
    for name, of in result.figures.items():
        table.row(
            result, name, str(of["gpus"]), f"{of['published_tflops']:.1f}", f"{of['predicted_tflops']:.1f}",
            f"{of['error']:+.0%}", of["left_out"], of["source"],
        )  # fmt: skip
    return block(table)


def planning(results: Results) -> str:
    """Step time and memory on this kind of CPU beside the planner's, after calibration."""
    table = Table(
        "configuration", "step, processor s", "predicted", "error", "peak memory, MiB", "predicted", "error"
    )  # fmt: skip
    result = newest(results, "planning")
    if result is None:
        table.unverified("planning", "all configurations")
        return block(table)
    for name, of in result.figures["configurations"].items():
        cells = [name]
        for kind, unit, form in (("step", "seconds", ".2f"), ("peak", "mib", ",.0f")):
            measured, ours = of[f"{kind}_{unit}"], of[f"predicted_{unit}"]
            both = (
                (format(measured, form), format(ours, form), f"{ours / measured - 1:+.0%}") if measured else ("",) * 3
            )
            cells += both
        table.row(result, *cells)
    return block(table)


def scaling(results: Results) -> str:
    """Weak and strong scaling of base and large."""
    result = newest(results, "scaling")
    if result is None:
        table = Table("recipe and packs", "GPUs", "tokens/s")
        table.unverified("scaling", "all")
        return block(table)
    table = Table(
        "recipe and packs", "GPUs", "settings that are fastest", "memory, GiB", "step, s", "tokens/s", "MFU",
        "a GPU's tokens/s over that of the fewest", "most of the step",
    )  # fmt: skip
    for kind, title in (("weak", "8 packs a rank"), ("strong", "512 packs a step")):
        for name, points in result.figures[kind].items():
            first = None
            for gpus, of in points.items():
                rate = of["tokens_per_second"] / int(gpus)
                first = first or rate
                table.row(
                    result, f"{name}, {title}", f"{int(gpus):,}", _settings(of), f"{of['memory_bytes'] / 2**30:.0f}",
                    f"{of['step_seconds']:.2f}", f"{of['tokens_per_second']:,.0f}", f"{of['mfu']:.1%}",
                    f"{rate / first:.2f}", _largest(of),
                )  # fmt: skip
    return block(table)


def budgets(results: Results) -> str:
    """1e12 tokens, with failures, and what storage must deliver."""
    table = Table(
        "recipe", "GPUs", "days", "GPU hours", "failures", "lost", "save every", "checkpoint, GB", "written in",
        "pictures/s", "reading, GB/s",
    )  # fmt: skip
    result = newest(results, "scaling")
    if result is None:
        table.unverified("scaling", "all")
        return block(table)
    for name, points in result.figures["weak"].items():
        for gpus, of in points.items():
            table.row(
                result, name, f"{int(gpus):,}", f"{of['days']:,.2f}", f"{of['gpu_hours']:,.0f}",
                f"{of['failures']:,.1f}", f"{of['lost_share']:.1%}", f"{of['save_every_seconds'] / 60:,.0f} min",
                f"{of['checkpoint_bytes'] / 1e9:,.0f}", f"{of['save_seconds']:,.1f} s",
                f"{of['pictures_per_second']:,.0f}", f"{of['read_rate'] / 1e9:,.2f}",
            )  # fmt: skip
    return block(table)


def internet(results: Results) -> str:
    """Data of internet scale, and how packs are filled."""
    table = Table("what", "figure")
    result = newest(results, "scaling")
    if result is None:
        table.unverified("scaling", "all")
        return block(table)
    data = result.figures["internet"]
    table.row(result, f"{data['pairs']:.0e} pairs at 35 kB", f"{data['bytes'] / 1e12:,.0f} TB")
    table.row(result, "shards of 1 GB for them", f"{data['shards']:,.0f}")
    table.row(result, "conversion: records/s of one core", f"{data['converted_per_second_and_core']:,.0f}")
    table.row(result, "conversion of 1e8 records, core hours", f"{data['core_hours_of_1e8_records']:,.0f}")
    table.row(result, f"conversion of {data['pairs']:.0e} pairs, core hours", f"{data['core_hours']:,.0f}")
    for name, of in result.figures["packs"].items():
        used = f"{of['tokens_used']:.0%}; {of['patches_used']:.0%}, spread {of['patches_spread']:.0%} of it"
        table.row(
            result, f"{name}: tokens and patches of a pack that are used", f"{used}, most {of['patches_most']:.0%}"
        )
    return block(table)


def _settings(of: dict[str, Any]) -> str:
    words = [f"ZeRO-{of['zero_stage']}", f"EP {of['ep_size']}", f"{of['micro_batch']} x {of['accumulation']} packs"]
    if of["recompute"] != "none":
        words.append(f"{of['recompute']} recomputed")
    words += [part.replace("_", " ") for part in of["offload"]]
    return ", ".join(words)


def _largest(of: dict[str, Any], count: int = 3) -> str:
    largest = sorted(of["parts"].items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name.replace('_', ' ')} {value / of['step_seconds']:.0%}" for name, value in largest)
