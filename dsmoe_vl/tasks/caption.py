"""Captioning of images and videos: vision tokens, the task token, then the text with a language-model loss.

position   0 .. n-1        n            n+1     n+2
token      <image> * n     <caption>    "a"     "dog"
label      -               "a"          "dog"   </s>
"""

from __future__ import annotations

import zlib

import numpy as np
from torch import Tensor

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.segment import IGNORE, Batch, Modality, Sample, Segment, TaskId
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.tasks.pictures import PictureReader
from dsmoe_vl.tasks.task import TaskOutput

_PLACEHOLDER = {Modality.IMAGE: "<image>", Modality.VIDEO: "<video>"}


class CaptionTask:
    """See the module's drawing. One caption of a sample is learned an epoch, the next one in the next."""

    task_id: TaskId = TaskId.CAPTION
    terms: tuple[str, ...] = ("caption",)

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pictures = PictureReader(recipe.data, recipe.model.vision)

    def encode(self, sample: Sample) -> list[Segment]:
        """One segment. Raises DataError without media or without a caption."""
        captions = [text for text in captions_of(sample) if text.strip()]
        if not captions:
            raise DataError("empty caption")
        chosen = captions[(zlib.crc32(sample.key.encode()) + sample.epoch) % len(captions)]
        prompt = self.prompt(sample)
        text = self.tokenizer.encode(chosen.strip())
        start = prompt.length - 1  # the task token predicts the first piece
        labels = np.full(prompt.length + len(text), IGNORE, dtype=np.int32)
        labels[start:] = [*text, self.tokenizer.eos]
        return [
            Segment(
                TaskId.CAPTION,
                np.concatenate((prompt.tokens, np.asarray(text, dtype=np.int32))),
                labels,
                np.concatenate((prompt.modality, np.full(len(text), Modality.TEXT, dtype=np.int32))),
                prompt.pictures,
            )
        ]

    def prompt(self, sample: Sample) -> Segment:
        """The segment up to the task token, from which a caption is generated."""
        modality, pictures, vision_tokens = self.pictures.read(sample)
        tokens = np.full(vision_tokens + 1, self.tokenizer.control(_PLACEHOLDER[modality]), dtype=np.int32)
        tokens[-1] = self.tokenizer.control("<caption>")
        modalities = np.full(vision_tokens + 1, modality, dtype=np.int32)
        modalities[-1] = Modality.TEXT
        return Segment(TaskId.CAPTION, tokens, np.full_like(tokens, IGNORE), modalities, pictures)

    def loss(self, model: VisionLanguageModel, hidden: Tensor, batch: Batch) -> TaskOutput:
        """Sum of the cross entropies of all caption targets."""
        rows = ((batch.labels != IGNORE) & (batch.task_ids == TaskId.CAPTION)).nonzero().squeeze(1)
        return TaskOutput({"caption": model.head(hidden.index_select(0, rows), batch.labels.index_select(0, rows))})


def captions_of(sample: Sample) -> list[str]:
    """All captions of a sample: KEY.json's `captions`, else KEY.txt."""
    captions = sample.meta.get("captions")
    return [str(text) for text in captions] if isinstance(captions, list) and captions else [sample.text]
