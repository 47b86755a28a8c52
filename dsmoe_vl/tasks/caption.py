"""Captioning of images and videos: vision tokens, perhaps speech tokens of the sample's recording, the task token, then
the text with a language-model loss.

position   0 .. n-1        n            n+1     n+2
token      <image> * n     <caption>    "a"     "dog"
label      -               "a"          "dog"   </s>
"""

from __future__ import annotations

import zlib

import numpy as np
from torch import Tensor, nn

from dsmoe_vl.config.task_table import CaptionConfig, task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.tasks.language import followed_by, language_loss
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.task import TaskOutput

_NUMBER = task_number("caption")


class CaptionTask:
    """Token layout: see the module docstring. Each epoch trains on one caption of a sample, the next epoch on the next.

    Word dropout (Bowman et al. 2016, section 3.1) replaces input tokens by the unknown token, so that the model relies
    more on the picture and less on the preceding words.
    """

    name: str = "caption"

    def __init__(
        self, reader: MediaReader, tokenizer: Tokenizer, settings: CaptionConfig, training: bool = True
    ) -> None:
        self.reader = reader
        self.tokenizer = tokenizer
        self.word_dropout = settings.word_dropout if training else 0.0
        self.hears = settings.hears

    @staticmethod
    def heads(settings: CaptionConfig, width: int) -> dict[str, nn.Module]:
        """Empty: the task uses the decoder's language head."""
        return {}

    def encode(self, sample: Sample) -> list[Segment]:
        """One segment. Raises DataError without media or without a caption."""
        text = self.tokenizer.encode(chosen_caption(sample))
        segment = followed_by(self.prompt(sample), text, self.tokenizer.eos)
        if self.word_dropout:
            rng = np.random.default_rng((zlib.crc32(sample.key.encode()), sample.epoch))
            hidden = rng.random(len(text)) < self.word_dropout
            segment.tokens[segment.length - len(text) :][hidden] = self.tokenizer.unk
        return [segment]

    def prompt(self, sample: Sample) -> Segment:
        """The prompt for generation: the segment up to and including the task token."""
        hears = self.hears and sample.recording is not None
        return self.reader.prompt(sample, _NUMBER, self.tokenizer, "<caption>", hears=hears)

    def loss(self, model: VisionLanguageModel, hidden: Tensor, batch: Batch) -> TaskOutput:
        """Cross entropy, summed over all caption targets."""
        return TaskOutput({"caption": language_loss(model, hidden, batch, _NUMBER)})


def chosen_caption(sample: Sample) -> str:
    """The caption of this epoch. Raises DataError if there is none."""
    contents = contents_of(sample)
    if not contents.captions:
        raise DataError(contents.no_caption)
    return contents.captions[(zlib.crc32(sample.key.encode()) + sample.epoch) % len(contents.captions)]
