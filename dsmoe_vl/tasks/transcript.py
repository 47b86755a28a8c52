"""Speech to text: speech tokens, the task token, then the words with a language-model loss.

position   0 .. n-1        n               n+1     n+2
token      <speech> * n    <transcript>    "a"     "dog"
label      -               "a"             "dog"   </s>
"""

from __future__ import annotations

from torch import Tensor, nn

from dsmoe_vl.config.task_table import TranscriptConfig, task_number
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

_NUMBER = task_number("transcript")


class TranscriptTask:
    """Token layout: see the module docstring. A picture or video of the sample is not looked at."""

    name: str = "transcript"

    def __init__(
        self, reader: MediaReader, tokenizer: Tokenizer, settings: TranscriptConfig, training: bool = True
    ) -> None:
        self.reader = reader
        self.tokenizer = tokenizer

    @staticmethod
    def heads(settings: TranscriptConfig, width: int) -> dict[str, nn.Module]:
        """Empty: the task uses the decoder's language head."""
        return {}

    def encode(self, sample: Sample) -> list[Segment]:
        """One segment. Raises DataError without a recording or without its words."""
        contents = contents_of(sample)
        if contents.no_transcript:
            raise DataError(contents.no_transcript)
        return [followed_by(self.prompt(sample), self.tokenizer.encode(contents.transcript), self.tokenizer.eos)]

    def prompt(self, sample: Sample) -> Segment:
        """The prompt for generation: the segment up to and including the task token. Raises DataError."""
        return self.reader.prompt(sample, _NUMBER, self.tokenizer, "<transcript>", sees=False, hears=True)

    def loss(self, model: VisionLanguageModel, hidden: Tensor, batch: Batch) -> TaskOutput:
        """Cross entropy, summed over all targets of transcripts."""
        return TaskOutput({"transcript": language_loss(model, hidden, batch, _NUMBER)})
