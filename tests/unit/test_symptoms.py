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
    high_rate,
    non_finite,
    overfitting,
    stalled_task,
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


def held_out(count=12, every=50, **losses):
    """Evaluations, the first one before training; a value is a function of a line's index from 0 to 1."""
    return [
        {"step": every * index, **{f"eval_{name}": of(index / (count - 1)) for name, of in losses.items()}}
        for index in range(count)
    ]


def valley(at):
    """Falls from 3 to 1 in the first third, then rises to 2."""
    return 3 - 6 * at if at < 1 / 3 else 0.5 + 1.5 * at


def falls(at):
    """From 3 to 1."""
    return 3 - 2 * at


def test_a_held_out_loss_that_rises_while_the_training_loss_falls():
    lines = [*held_out(loss=valley, loss_caption=valley, loss_retrieval=falls), *series(loss_retrieval=falls)]
    text = overfitting(lines, FACTS)
    assert text is not None and "loss_caption (held out 1.045 at step 200, 2.000 now)" in text, text
    assert all(word in text for word in ("data.augment", "run.steps", "weight_decay"))
    assert "loss_retrieval" not in text
    assert not any(other(lines, FACTS) for other in SIGNS if other is not overfitting)


def test_a_held_out_loss_above_its_value_before_training():
    lines = [*held_out(loss=falls, loss_caption=lambda at: 3.0 + 0.1 * (at > 0)), *series()]
    assert "loss_caption (held out 3.000 at step 0, 3.100 now)" in str(overfitting(lines, FACTS))
    resumed = [*held_out(loss=falls, loss_caption=lambda at: 3.0 + 0.1 * (at > 0))[1:], *series()]
    assert overfitting(resumed, FACTS) is None


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        (falls, {}),
        (lambda at: 3 - 2 * min(at, 0.5) + 0.05 * (round(at * 11) % 2), {}),  # stands still, with noise
        (lambda at: falls(at) if at < 0.7 else 3.5, {}),  # too few evaluations
        (valley, {"loss_caption": 3.0}),  # the training loss stands still: no overfitting
        (lambda at: math.nan if at > 0.9 else valley(at), {}),
    ],
)
def test_what_is_no_overfitting(loss, changes):
    assert overfitting([*held_out(loss=falls, loss_caption=loss), *series(**changes)], FACTS) is None


PAIRS = 20.0
SIGMOID = math.log(PAIRS) - (PAIRS - 1) * math.log1p(-1 / PAIRS)


@pytest.mark.parametrize(
    ("changes", "facts", "words"),
    [
        ({"loss_retrieval": lambda at: max(3.5 - 5 * at, math.log(PAIRS)), "pairs": PAIRS}, {}, "loss_retrieval"),
        ({"loss_retrieval": lambda at: max(9 - 40 * at, SIGMOID), "pairs": PAIRS}, {"contrast": "sigmoid"}, "(3.970)"),
        ({"loss_ranking": lambda at: 0.8 if at < 0.1 else 0.69}, {}, "loss_ranking (0.690) is that of guesses"),
    ],
)
def test_a_task_that_guesses(changes, facts, words):
    text = stalled_task(series(**changes), replace(FACTS, **facts))
    assert text is not None and words in text and "[tasks.NAME]" in text, text
    assert not any(other(series(**changes), FACTS) for other in SIGNS if other is not stalled_task)
    assert stalled_task(series(**changes), replace(FACTS, steps=10_000, **facts)) is None  # too early to say


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_retrieval": lambda at: max(3.5 - 5 * at, 2.5), "pairs": PAIRS},  # a converged task
        {"loss_retrieval": math.log(PAIRS) + 0.5},  # how many pairs is not known
        {"loss_retrieval": 0.0, "pairs": 1.0},
        {"loss_ranking": 0.5},
        {"loss_importance": lambda at: max(0.1 - at, 0.05)},
    ],
)
def test_a_task_that_learned_what_it_can_is_not_stalled(changes):
    assert stalled_task(series(**changes), FACTS) is None


def noisy(value, share):
    """Values of a function, irregularly above and below by up to a share."""
    return lambda at: value(at) * (1 + share * math.sin(1e4 * at))


def joined(at):
    """Learned in the first half; then another task joins."""
    return max(3 - 8 * at, 1.5) if at < 0.5 else 2.0


def test_a_task_that_is_lost_while_others_learn():
    lost = series(120, loss_summary=noisy(joined, 0.1))
    text = stalled_task(lost, FACTS)
    assert text is not None and "loss_summary has risen from" in text, text
    all_rise = series(120, loss_summary=joined, loss_caption=valley)
    assert stalled_task(all_rise, FACTS) is None  # not a matter of tasks that compete
    still = series(120, loss_summary=noisy(lambda at: max(3 - 8 * at, 1.5), 0.2))
    assert stalled_task(still, FACTS) is None  # within its noise


def schedule(at):
    """A warm-up of a third, a peak, a decay of a third."""
    return 1e-3 * min(3 * at + 0.01, 1.0, 3.1 - 3 * at)


def test_a_loss_that_rises_with_the_learning_rate():
    lines = series(loss=lambda at: 3 - 6 * at if at < 0.2 else 2.4, lr=schedule)[:40]
    text = high_rate(lines, FACTS)
    assert text is not None and "half of optimizer.params.lr" in text and "doctor.py lr" in text, text
    assert not any(other(lines, FACTS) for other in SIGNS if other is not high_rate)


@pytest.mark.parametrize(
    "loss",
    [
        falls,
        noisy(lambda at: max(3 - 6 * at, 1.5), 0.15),  # stands still at the peak
        after(0.55, 1.5, 4.0),  # a spike, so far
        lambda at: 1.0 if at < 0.9 else 3.0,  # rises after the peak
    ],
)
def test_a_rate_that_does_no_harm(loss):
    lines = series(loss=loss, lr=schedule)
    assert [high_rate(lines[:count], FACTS) for count in range(1, 36)] == [None] * 35
    assert high_rate(lines, FACTS) is None
    assert high_rate(series(loss=loss), FACTS) is None  # without a rate


def test_evaluations_are_watched_too():
    watch = Watch(Recipe(run=RunConfig(log_every=10)), 0)
    lines = sorted([*held_out(loss=valley, loss_caption=valley), *series()], key=lambda line: line["step"])
    told = {int(line["step"]): text for line in lines for text in watch.look(int(line["step"]), line)}
    assert [step for step, text in told.items() if text.startswith("overfitting: ")] == [450]
