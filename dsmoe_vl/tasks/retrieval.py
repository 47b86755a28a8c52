"""Image-text and video-text retrieval: two segments, each ending with an embedding token.

token   <image> * n  <embed>          "a"  "dog"  <embed>     or     <speech> * m  <embed>

Pairs with the same content are not negatives of each other: one picture or video, or equal `content` in KEY.json.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

from dsmoe_vl.config.task_table import RetrievalConfig, task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import IGNORE, Modality, Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.parallel.collectives import gather_rows, own_rank
from dsmoe_vl.tasks.caption import chosen_caption
from dsmoe_vl.tasks.contrastive import info_nce_sum, negative_pairs, sigmoid_sum
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.retrieval_head import RetrievalEmbeddings, RetrievalHead
from dsmoe_vl.tasks.task import TaskOutput

_NUMBER = task_number("retrieval")


class RetrievalTask:
    """Token layout: see the module docstring."""

    name: str = "retrieval"

    def __init__(
        self, reader: MediaReader, tokenizer: Tokenizer, settings: RetrievalConfig, training: bool = True
    ) -> None:
        self.reader = reader
        self.tokenizer = tokenizer
        self.settings = settings

    @staticmethod
    def heads(settings: RetrievalConfig, width: int) -> dict[str, nn.Module]:
        """Projections of both sides, and the temperature."""
        return {"retrieval": RetrievalHead(width, settings)}

    def encode(self, sample: Sample) -> list[Segment]:
        """Two segments. Raises DataError without media, or without a caption and a recording."""
        media = self.media(sample)
        text = self.spoken(sample) if self._is_spoken(sample) else self.text(chosen_caption(sample))
        media.pair = text.pair = pair_id(sample)
        return [media, text]

    def media(self, sample: Sample) -> Segment:
        """Segment of the picture or video. Raises DataError."""
        return self.reader.prompt(sample, _NUMBER, self.tokenizer, "<embed>")

    def spoken(self, sample: Sample) -> Segment:
        """Segment of a recording, which stands for a text. Raises DataError."""
        return self.reader.prompt(sample, _NUMBER, self.tokenizer, "<embed>", sees=False, hears=True)

    def text(self, text: str) -> Segment:
        """Segment of a text."""
        tokens = np.array([*self.tokenizer.encode(text), self.tokenizer.control("<embed>")], dtype=np.int32)
        segment = Segment(_NUMBER, tokens, np.full_like(tokens, IGNORE), np.full_like(tokens, Modality.TEXT))
        return segment.after(self.tokenizer.begin)

    def _is_spoken(self, sample: Sample) -> bool:
        """Whether the recording is the text side, in this epoch."""
        if sample.recording is None or not self.reader.speech.layers:
            return False
        if not contents_of(sample).captions:
            return True
        chance = np.random.default_rng((zlib.crc32(sample.key.encode()), sample.epoch, _NUMBER)).random()
        return chance < self.settings.spoken

    def loss(self, model: VisionLanguageModel, hidden: Tensor, batch: Batch) -> TaskOutput:
        """Contrastive loss of this rank's pairs against all pairs of the micro-step, summed.

        In training with the gradient cache, `training/gradient_cache.py` computes the loss from the embeddings.
        """
        embeddings = embed_pairs(model, hidden, batch)
        if self.settings.gradient_cache and model.training:
            return TaskOutput({}, embeddings)
        return TaskOutput({"retrieval": contrastive_sum(self.settings.loss, embeddings, batch)}, embeddings)


def embed_pairs(model: VisionLanguageModel, hidden: Tensor, batch: Batch) -> RetrievalEmbeddings:
    """Both sides of this rank's pairs: hidden [T, D] -> [n, W] each."""
    head = model.get_submodule("retrieval")
    return head(hidden, batch.media_embedding, batch.text_embedding, batch.cu_segments)


def contrastive_sum(loss: str, own: RetrievalEmbeddings, batch: Batch) -> Tensor:
    """Loss sum of this rank's pairs. Negatives are gathered from all ranks, with exact gradients."""
    rows = batch.pairs_of_ranks
    first = sum(rows[: own_rank()]) if len(rows) > 1 else 0
    all_media, all_text = gather_rows(torch.cat((own.media, own.text), dim=-1), rows).chunk(2, dim=-1)
    negatives = negative_pairs(batch.pair_ids, gather_rows(batch.pair_ids, rows))
    if loss == "sigmoid":
        return sigmoid_sum(own.media, all_text, own.scale, own.bias, negatives, first)
    return info_nce_sum(own.media, own.text, all_media, all_text, own.scale, negatives, first)


def pair_id(sample: Sample) -> int:
    """Id of a sample's content, from KEY.json's `content`, else its `id`, else the key; 63 bits."""
    shown = sample.meta.get("content") or f"{sample.source.name}/{sample.meta.get('id', sample.key)}"
    name = str(shown).encode("utf-8", "surrogatepass")  # scraped JSON contains lone surrogates
    return zlib.crc32(name) << 31 | zlib.adler32(name) & 0x7FFFFFFF
