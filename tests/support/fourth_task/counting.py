"""What the fourth task adds to training, evaluation and report; no other file knows of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import nn

from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.segment import IGNORE, Segment
from dsmoe_vl.errors import DataError
from dsmoe_vl.inference.generate import texts
from dsmoe_vl.report.content import ScoreLabel, Section
from dsmoe_vl.tasks.language import followed_by, language_loss
from dsmoe_vl.tasks.task import TaskOutput

NUMBER = task_number("counting")
WORDS = ("none", "one", "two")


class CountingTask:
    """A word for the number of objects, and a head that scores whether each of its pieces has an odd id."""

    name = "counting"

    def __init__(self, reader, tokenizer, settings, training=True):
        self.reader, self.tokenizer = reader, tokenizer

    @staticmethod
    def heads(settings, width):
        return {"parity": nn.Linear(width, 1)}

    def encode(self, sample):
        objects = sample.meta.get("attributes")
        if not objects:
            raise DataError("no objects to count")
        return [followed_by(self.prompt(sample), self.tokenizer.encode(WORDS[len(objects)]), self.tokenizer.eos)]

    def prompt(self, sample):
        modality, pictures, vision_tokens = self.reader.read(sample)
        tokens, modalities = self.reader.placeholders(modality, vision_tokens, self.tokenizer, "<counting>")
        segment = Segment(NUMBER, tokens, np.full_like(tokens, IGNORE), modalities, pictures)
        return segment.after(self.tokenizer.begin)

    def loss(self, model, hidden, batch):
        rows = ((batch.labels != IGNORE) & (batch.task_ids == NUMBER)).nonzero().squeeze(1)
        odd = model.get_submodule("parity")(hidden.index_select(0, rows)).squeeze(1).float()
        wanted = (batch.labels.index_select(0, rows) % 2).float()
        parity = F.binary_cross_entropy_with_logits(odd, wanted, reduction="sum")
        return TaskOutput({"counting": language_loss(model, hidden, batch, NUMBER), "parity": parity})


class CountingEvaluation:
    """The share of pictures whose number of objects is right."""

    labels = {"samples": ScoreLabel("pictures counted", "count"), "right": ScoreLabel("right counts, %", "percent")}  # noqa: RUF012
    section = Section("counts", "How many objects a picture shows", Path(__file__).with_name("counting.html"))

    def __init__(self, trained, options, dealer):
        self.trained, self.dealer = trained, dealer

    def evaluate(self, folder):
        samples, task = folder.own(), self.trained.task(CountingTask)
        own = []
        for sample in samples:
            if sample.meta.get("attributes"):
                (said,) = texts(self.trained, [task.prompt(sample)], max_tokens=4)
                own.append((samples.number(sample), (sample.key, said, WORDS[len(sample.meta["attributes"])])))
        found = self.dealer.merge(own)
        right = sum(said == wanted for _, said, wanted in found)
        return ({"samples": len(found), "right": right / len(found)} if found else {}), found

    def finish(self):
        """Nothing is left to do."""
