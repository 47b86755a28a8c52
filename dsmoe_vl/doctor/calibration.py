"""A cluster file for this kind of CPU: rates of products, memory, links and storage, and what steps reach of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.doctor.timed_step import Timed, on_ranks, time_steps
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.cluster import FIGURES, Cluster, write_cluster
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.products import Shape
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.run_memory import run_memory
from dsmoe_vl.planner.step_time import StepTime, step_time

_ROOT = Path(__file__).resolve().parents[2]
_STEPS, _ROUNDS = 4, 8
# Overrides of the recipe quickstart, packs, ranks.
STEPS_OF_CALIBRATION: tuple[tuple[list[str], int], ...] = (
    ([], 1),
    ([], 4),
    (["model.layers=8", "model.vision.layers=1"], 2),
    (["model.layers=2", "model.vision.layers=8"], 2),
    (["model.width=384", "moe.ffn_width=512", "model.vision.width=256"], 2),
    (["moe.experts=32", "moe.top_k=4", "moe.ffn_width=64"], 2),
)


def measure_cluster() -> str:
    """The text of the file. Takes some minutes. Raises DsmoeVlError."""
    rates = on_ranks(1, _rates)
    link_bandwidth, link_latency = on_ranks(2, _exchange)
    plans = [small_plan(overrides, packs) for overrides, packs in STEPS_OF_CALIBRATION]
    timed = [time_steps(plan, _STEPS) for plan in plans]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    cluster = Cluster(
        name=f"CPU, {cores} cores, one rank each", device="cpu", accelerators=cores,
        peak_flops=rates["products"], product_share=1.0, attention_share=rates["attention"] / rates["products"],
        memory_bytes=memory / cores, memory_bandwidth=rates["memory"], memory_share=1.0,
        reserved_bytes=0.0, fragmentation=0.0, operator_seconds=rates["operator"],
        link_bandwidth=link_bandwidth, link_share=1.0, link_latency=link_latency, network_bandwidth=link_bandwidth,
        network_share=1.0, network_latency=link_latency, host_bandwidth=rates["memory"], host_memory_bytes=memory,
        host_memory_bandwidth=rates["memory"], storage_bandwidth=_storage(), patches_per_second=50e3,
        failures_per_day=0.0,
    )  # fmt: skip
    return write_cluster(fitted_memory(fitted(cluster, plans, timed), plans, timed), _sources())


def small_plan(overrides: list[str], packs: int, ranks: int = 1, **deepspeed: Any) -> RunPlan:
    """A plan of the recipe quickstart on CPUs. Raises ConfigError."""
    recipe = load_recipe(_ROOT / "launch/recipes/quickstart.toml", overrides)
    settings = load_deepspeed(_ROOT / "ds_configs/moe.json") | {"train_micro_batch_size_per_gpu": packs, **deepspeed}
    return resolve(recipe, settings, ranks, device="cpu", bf16_unit=False)


def shape_of(plan: RunPlan, timed: Timed) -> Shape:
    """What was computed on."""
    return Shape(timed.tokens, timed.patches, timed.labels, plan.ep_size)


def fitted(cluster: Cluster, plans: list[RunPlan], timed: list[Timed]) -> Cluster:
    """With the shares of products and memory, and the operators' time, with which relative errors of steps are least:
    least squares; a negative one becomes zero. Times are the processor's, so that other work counts less."""
    found = cluster
    for _ in range(_ROUNDS):  # whether a product computes or moves depends on the rates
        both = zip(plans, timed, strict=True)
        rows = [_parts(step_time(plan, found, 0.0, shape_of(plan, of))) / of.processor_seconds for plan, of in both]
        products, memory, operators = _least_squares(np.array(rows))
        found = replace(
            found,
            peak_flops=found.peak_flops / products,
            memory_bandwidth=found.memory_bandwidth / memory,
            operator_seconds=found.operator_seconds * operators,
        )
    peak, bandwidth = (
        max(getattr(one, name) for one in (cluster, found)) for name in ("peak_flops", "memory_bandwidth")
    )
    share = found.peak_flops / peak
    return replace(
        found,
        peak_flops=peak, product_share=share, attention_share=found.attention_share * share,
        memory_bandwidth=bandwidth, memory_share=found.memory_bandwidth / bandwidth,
    )  # fmt: skip


def _least_squares(matrix: np.ndarray) -> list[float]:
    """Factors of the columns, none below a thousandth, with which rows come closest to 1."""
    used, factors = list(range(matrix.shape[1])), np.zeros(matrix.shape[1])
    while used:
        found = np.linalg.lstsq(matrix[:, used], np.ones(len(matrix)), rcond=None)[0]
        if (found > 0).all():
            factors[used] = found
            break
        used = [index for index, factor in zip(used, found, strict=True) if factor > 0]
    return [float(max(factor, 1e-3)) for factor in factors]


def fitted_memory(cluster: Cluster, plans: list[RunPlan], timed: list[Timed]) -> Cluster:
    """With the fragmentation and the memory of a process without a model that make relative errors of peaks least."""
    rows, wanted = [], []
    for plan, found in zip(plans, timed, strict=True):
        memory = run_memory(plan, replace(cluster, reserved_bytes=0.0, fragmentation=0.0), shape_of(plan, found))
        rows.append([1 / found.peak_bytes, (memory.device - memory.states) / found.peak_bytes])
        wanted.append(1 - memory.device / found.peak_bytes)
    reserved, fragmentation = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    return replace(cluster, reserved_bytes=max(float(reserved), 0.0), fragmentation=max(float(fragmentation), 0.0))


def _parts(time: StepTime) -> np.ndarray:
    """Seconds of products with attention, of memory with the optimizer, and of the host."""
    return np.array([time.products + time.attention, time.memory_traffic + time.optimizer, time.host])


def _rates(ranks: Ranks) -> dict[str, float]:
    """FLOP/s of products and of attention, bytes/s of memory, seconds of an operator; of one thread."""
    x, w = torch.randn(1024, 512), torch.randn(512, 1024)
    big, small = torch.randn(2**24), torch.randn(8)
    q, k, v = (torch.randn(32, 6, 32, 32, requires_grad=True) for _ in range(3))
    causal = 4.0 * 32 * 6 * 32 * 32 * 32 / 2

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    return {
        "products": 2.0 * 1024 * 512 * 1024 / _seconds(lambda: x @ w),
        "attention": 3.5 * causal / _seconds(attend),
        "memory": 3.0 * 4 * len(big) / _seconds(lambda: torch.add(big, big, out=big)),
        "operator": _seconds(lambda: small + small),
    }


def _exchange(ranks: Ranks) -> tuple[float, float]:
    """Bytes/s and seconds a message between two processes."""
    rows = torch.randn(2 * 2**20)
    received = torch.empty_like(rows)
    tiny = torch.zeros(2)
    large = _seconds(lambda: dist.all_to_all_single(received, rows), 20)
    latency = _seconds(lambda: dist.all_to_all_single(torch.empty(2), tiny), 200)
    return 4 * len(rows) / 2 / max(large - latency, 1e-9), latency


def _storage() -> float:
    """Bytes/s of writing a file of 256 MiB and syncing it, in the working directory's file system."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
        started = time.perf_counter()
        for _ in range(256):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return 256 * len(block) / (time.perf_counter() - started)


def _seconds(work: Callable[[], Any], repeats: int = 50) -> float:
    """The median of so many runs after the first; of ranks that exchange, all take part in each."""
    times: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _sources() -> dict[str, str]:
    """Where each figure is from."""
    measured = "measured by launch/plan.py --calibrate"
    fit = f"{measured}: fitted to {len(STEPS_OF_CALIBRATION)} kinds of steps of the recipe quickstart"
    others = {
        **dict.fromkeys(("product_share", "memory_share", "operator_seconds", "reserved_bytes", "fragmentation"), fit),
        "accelerators": "the cores that this process may use",
        "memory_bytes": "the machine's memory, a part for each core",
        "network_bandwidth": "as inside the machine: no other was measured",
        "network_share": "as inside the machine: no other was measured",
        "network_latency": "as inside the machine: no other was measured",
        "host_bandwidth": "a CPU is its own host",
        "patches_per_second": "not measured: from benchmarks/results/data.json, of another day",
        "failures_per_day": "not measured: 0",
    }
    return {key: others.get(key, measured) for key in FIGURES}
