"""What --calibrate fits: with times and peaks that the planner itself makes, it finds the figures that made them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsmoe_vl.doctor.calibration import STEPS_OF_CALIBRATION, fitted, fitted_memory, shape_of, small_plan
from dsmoe_vl.doctor.timed_step import Timed, on_ranks
from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.planner.cluster import cluster_of
from dsmoe_vl.planner.run_memory import run_memory
from dsmoe_vl.planner.step_time import step_time

MEASURED = replace(
    cluster_of("h200"), device="cpu", accelerators=2, peak_flops=5e10, product_share=1.0, attention_share=0.1,
    memory_bandwidth=1e10, memory_share=1.0, reserved_bytes=0.0, fragmentation=0.0, operator_seconds=5e-6,
)  # fmt: skip


def test_the_fit_finds_what_made_the_times_and_peaks():
    true = replace(MEASURED, product_share=0.6, attention_share=0.06, memory_share=0.3, operator_seconds=2e-5,
                   reserved_bytes=3e8, fragmentation=0.2)  # fmt: skip
    plans = [small_plan(overrides, packs) for overrides, packs in STEPS_OF_CALIBRATION]
    timed = []
    for plan in plans:
        sizes = plan.micro_batch * 768, plan.micro_batch * 1856, plan.micro_batch * 319
        shape = shape_of(plan, Timed(0, 0, 0, *sizes))
        seconds = step_time(plan, true, 0.0, shape).total
        timed.append(Timed(seconds, seconds, round(run_memory(plan, true, shape).device), *sizes))
    found = fitted_memory(fitted(MEASURED, plans, timed), plans, timed)
    assert found.reserved_bytes == pytest.approx(3e8, rel=1e-3) and found.fragmentation == pytest.approx(0.2, rel=1e-3)
    for plan, of in zip(plans, timed, strict=True):
        assert step_time(plan, found, 0.0, shape_of(plan, of)).total == pytest.approx(of.seconds, rel=0.02)


def test_faster_than_measured_raises_the_figure_and_not_the_share():
    true = replace(MEASURED, peak_flops=1e11, attention_share=0.1, memory_bandwidth=4e10)
    plans = [small_plan(overrides, packs) for overrides, packs in STEPS_OF_CALIBRATION]
    sizes = [(plan.micro_batch * 768, plan.micro_batch * 1856, plan.micro_batch * 319) for plan in plans]
    shapes = [shape_of(plan, Timed(0, 0, 0, *of)) for plan, of in zip(plans, sizes, strict=True)]
    seconds = [step_time(plan, true, 0.0, shape).total for plan, shape in zip(plans, shapes, strict=True)]
    timed = [Timed(of, of, 10**9, *size) for of, size in zip(seconds, sizes, strict=True)]
    found = fitted(MEASURED, plans, timed)
    assert found.product_share <= 1 and found.memory_share <= 1
    assert found.product_rate == pytest.approx(1e11, rel=0.1) and found.memory_rate == pytest.approx(4e10, rel=0.1)


def _fails(ranks):
    raise RuntimeError("on purpose")


def test_a_rank_that_fails_is_an_error_and_leaves_nothing():
    with pytest.raises(DsmoeVlError, match="a process of a measurement ended early"):
        on_ranks(1, _fails)
