"""Losses of given captions: those of training, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_tools.synthetic.scenes import scene
from dsmoe_vl.inference.generate import caption_task, generate, prompt_batch
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.inference.media import to_sample
from dsmoe_vl.inference.text_loss import text_losses
from tests.support.trained import random_run

TEXTS = ["a red square", "", "one large blue ring left of a green cross"]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    return load_run(random_run(tiny, tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def samples():
    return [to_sample(scene(np.random.default_rng(n), True, 48, 2)[0], "image") for n in range(len(TEXTS))]


def test_the_losses_are_those_of_the_task(trained, samples):
    task = caption_task(trained)
    found = text_losses(trained, [task.prompt(sample) for sample in samples], TEXTS)
    for sample, text, got in zip(samples, TEXTS, found, strict=True):
        if text:
            batch = prompt_batch(trained, task.encode(replace(sample, text=text)))
            with torch.no_grad():
                wanted = task.loss(trained.model, trained.model(batch)[0], batch).loss_sums["caption"]
            assert got.loss == pytest.approx(float(wanted), rel=1e-6, abs=1e-5)
        (alone,) = text_losses(trained, [task.prompt(sample)], [text])
        assert alone.loss == pytest.approx(got.loss, abs=1e-4)


class Numbers:
    """A tokenizer whose texts are ids, with any end."""

    def __init__(self, spoken, eos):
        self.spoken, self.eos = spoken, eos

    def encode(self, text):
        return [int(number) for number in text.split()]


def test_a_text_is_greedy_if_it_and_its_end_would_be_written(trained, samples):
    prompts = [caption_task(trained).prompt(sample) for sample in samples]
    for prompt, (first, second, third) in zip(prompts, generate(trained, prompts, 3), strict=True):
        numbers = replace(trained, tokenizer=Numbers(trained.tokenizer.spoken, third))
        other = next(row for row in numbers.tokenizer.spoken if row not in (first, second, third))
        texts = [f"{first} {second}", f"{first} {other}", f"{other} {second}"]
        assert [loss.is_greedy for loss in text_losses(numbers, [prompt] * 3, texts)] == [True, False, False]
        unended = replace(trained, tokenizer=Numbers(trained.tokenizer.spoken, other))
        assert not text_losses(unended, [prompt], texts[:1])[0].is_greedy
