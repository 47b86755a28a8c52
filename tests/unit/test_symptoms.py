"""Signs of trouble, on made-up series of logged values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dsmoe_vl.config.recipe import Recipe, RunConfig
from dsmoe_vl.monitor.symptoms import (
    LASTING,
    SIGNS,
    Facts,
    Watch,
    collapsing_router,
    exploding_gradient,
    non_finite,
    starving_loader,
    still_loss,
)

FACTS = Facts(experts=8, top_k=2, task_routing=False, from_start=True)
HEALTHY = {
    "loss": 3.0, "loss_caption": 3.0, "z_loss": 1.0, "grad_norm": 1.0, "step_ms": 100.0, "data_wait_ms": 3.0,
    "max_violation": 0.6, "dead_fraction": 0.0, "entropy": 1.5,
}  # fmt: skip


def series(count=60, every=10, **changes):
    """Lines of a run that learns; a change is a value, or a function of a line's index from 0 to 1."""
    lines = []
    for index in range(count):
        line = {**HEALTHY, "step": every * (index + 1), "loss_caption": 3 - 2 * index / count}
        for name, change in changes.items():
            line[name] = change(index / count) if callable(change) else change
        lines.append(line)
    return lines


def after(part, before, then):
    """A function that jumps."""
    return lambda at: then if at >= part else before


def test_a_healthy_run_has_no_sign():
    for length in (1, 3, LASTING, 60):
        assert [sign(series(length), FACTS) for sign in SIGNS] == [None] * len(SIGNS)


@pytest.mark.parametrize(
    ("sign", "changes", "words"),
    [
        (non_finite, {"loss_caption": math.nan}, ("loss_caption", "optimizer.params.lr", "gradient_clipping")),
        (non_finite, {"grad_norm": math.inf}, ("grad_norm", "checkpoint")),
        (exploding_gradient, {"grad_norm": after(0.98, 1.0, 15.0)}, ("15 times", "optimizer.params.lr")),
        (collapsing_router, {"dead_fraction": 0.5}, ("50 %", "moe.balance_weight", "moe.bias_rate")),
        (collapsing_router, {"max_violation": 2.9, "entropy": 0.01}, ("3.9 times", "0.010 nats of 2.08")),
        (starving_loader, {"data_wait_ms": 30.0}, ("30 %", "data.workers")),
        (still_loss, {"loss_caption": 3.0}, ("loss_caption (3.000 at first, 3.000 now)", "[tasks.NAME]")),
        (still_loss, {"loss_retrieval": lambda at: 2.0 + at}, ("loss_retrieval",)),
    ],
)
def test_a_sign_names_cause_and_setting(sign, changes, words):
    text = sign(series(**changes), FACTS)
    assert text is not None and all(word in text for word in words), text
    others = [other for other in SIGNS if other is not sign]
    assert not any(other(series(**changes), FACTS) for other in others)


@pytest.mark.parametrize(
    ("sign", "changes"),
    [
        (collapsing_router, {"dead_fraction": after(0.98, 0.0, 0.5)}),  # one line only
        (starving_loader, {"data_wait_ms": after(0.98, 1.0, 90.0)}),
        (exploding_gradient, {"grad_norm": lambda at: 1 + 8 * at}),
        (collapsing_router, {"entropy": 0.0}),  # sure routing over all experts is no collapse
    ],
)
def test_what_does_not_last_or_is_no_trouble_is_no_sign(sign, changes):
    assert sign(series(**changes), FACTS) is None


def test_what_the_recipe_wants_is_no_sign():
    lines = series(dead_fraction=0.5, loss_caption=3.0)
    assert collapsing_router(lines, replace(FACTS, task_routing=True)) is None
    assert collapsing_router(lines, replace(FACTS, experts=0)) is None
    assert still_loss(lines, replace(FACTS, from_start=False)) is None
    assert still_loss(lines[:12], FACTS) is None  # too early


def test_lines_without_routing_or_with_rare_tasks_are_understood():
    bare = [{"step": line["step"], "loss": 3.0, "loss_caption": line["loss_caption"]} for line in series()]
    assert not any(sign(bare, FACTS) for sign in SIGNS)


def test_a_sign_is_told_once_in_a_while():
    watch = Watch(Recipe(run=RunConfig(log_every=10)), 0)
    told = [line["step"] for line in series(100, data_wait_ms=50.0) if watch.look(int(line["step"]), line)]
    assert told == [10 * LASTING, 10 * LASTING + 200, 10 * LASTING + 400, 10 * LASTING + 600, 10 * LASTING + 800]


def test_the_first_lines_are_remembered_in_a_long_run():
    watch = Watch(Recipe(run=RunConfig(log_every=1)), 0)
    fallen = series(2000, every=1, loss_caption=lambda at: 3.0 if at < 0.01 else 1.0)
    assert [text for line in fallen for text in watch.look(int(line["step"]), line)] == []
