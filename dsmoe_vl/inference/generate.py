"""Generates texts from prompts: captions and transcripts here, summaries in `summarize.py`.

The decoder reads the prompts once, vision tokens included, and then one token per step and sequence. A token's keys,
values and routing do not depend on later tokens (`load.py` disables token dropping), so the tokens are the same as
without a cache (`tests/parity/test_generation.py`).

Shapes: S prompts, T tokens of all prompts, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack import assemble, collate
from dsmoe_vl.data.pack_shape import PackShape, SpeechShape
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.media import encode_all
from dsmoe_vl.inference.token_search import GREEDY, Decoder, Search, beam, greedy, sample
from dsmoe_vl.model.cache import KeyValueCache
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.tasks.transcript import TranscriptTask

MAX_TOKENS = 64  # of a text, unless the caller wants another limit


def caption(
    trained: TrainedModel, samples: list[Sample], max_tokens: int = MAX_TOKENS, search: Search = GREEDY
) -> list[str]:
    """One caption per sample. Raises ConfigError for a model without captions, DataError for unreadable media."""
    task = caption_task(trained)
    return texts(trained, encode_all(task.prompt, samples), max_tokens, search)


def caption_task(trained: TrainedModel) -> CaptionTask:
    """The model's captioning task. Raises ConfigError if the model has not learned it."""
    return trained.task(CaptionTask)


def transcribe(
    trained: TrainedModel, samples: list[Sample], max_tokens: int = MAX_TOKENS, search: Search = GREEDY
) -> list[str]:
    """The words of each sample's recording. Raises ConfigError for a model without transcripts, DataError for a sample
    without a readable recording."""
    return texts(trained, encode_all(trained.task(TranscriptTask).prompt, samples), max_tokens, search)


def texts(trained: TrainedModel, prompts: list[Segment], max_tokens: int, search: Search = GREEDY) -> list[str]:
    """As `generate`, decoded to text."""
    return [trained.tokenizer.decode(ids) for ids in generate(trained, prompts, max_tokens, search)]


def generate(
    trained: TrainedModel,
    prompts: list[Segment],
    max_tokens: int,
    search: Search = GREEDY,
    make_decoder: Callable[[TrainedModel, list[Segment], int], Decoder] | None = None,
) -> list[list[int]]:
    """Token ids that continue each prompt: at most `max_tokens`, without the end token, never a control symbol.

    Raises ConfigError unless `max_tokens` is positive. `make_decoder` replaces the `CachedDecoder`.
    """
    decoder = (make_decoder or CachedDecoder)(trained, prompts, max_tokens)
    return continuations(trained, decoder, prompts, max_tokens, search)


@torch.inference_mode()
def continuations(
    trained: TrainedModel, decoder: Decoder, prompts: list[Segment], max_tokens: int, search: Search
) -> list[list[int]]:
    """As `generate`, from a decoder that has read the prompts."""
    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens}: must be at least 1")
    end = trained.tokenizer.eos
    if search.top_p is not None:
        draws = torch.from_numpy(np.stack([_draws(search.seed, prompt, max_tokens) for prompt in prompts]))
        return sample(decoder, end, max_tokens, search.top_p, search.temperature, draws.to(trained.device))
    if search.beams > 1:
        return beam(decoder, end, max_tokens, search.beams)
    return greedy(decoder, end, max_tokens)


class CachedDecoder:
    """Continues prompts with a key-value cache."""

    def __init__(self, trained: TrainedModel, prompts: list[Segment], room: int) -> None:
        """Reads the prompts. `room`: maximum new tokens per prompt."""
        model = trained.recipe.model
        lengths = [prompt.length for prompt in prompts]
        self.model = trained.model
        self.batch = prompt_batch(trained, prompts)
        self.task_ids = torch.tensor([prompt.task for prompt in prompts], device=trained.device)
        self.unspeakable = unspeakable(trained)
        like = trained.model.embedding.weight
        self.cache = KeyValueCache(model.layers, lengths, room, model.kv_heads, model.width_of_head, like)
        with torch.inference_mode():
            self.hidden, _ = trained.model(self.batch, self.cache)  # [T, D], of the prompts

    def start(self) -> Tensor:
        """Logits [S, V] after the prompts."""
        return self._logits(self.hidden[self.cache.lengths.cumsum(0) - 1])

    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens, int64 [S]: logits [S, V] after them."""
        return self._logits(self.model.extend(tokens, self.task_ids, self.cache))

    def keep(self, rows: Tensor) -> None:
        """Continue with the sequences `rows`, int64 [S']."""
        self.task_ids = self.task_ids.index_select(0, rows)
        self.cache.keep(rows)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden).masked_fill(self.unspeakable, float("-inf"))


def unspeakable(trained: TrainedModel) -> Tensor:
    """Vocabulary rows that are never generated: control symbols except the end, rows without a piece. bool [V]."""
    mask = torch.ones(trained.recipe.tokenizer.vocab_size, dtype=torch.bool)
    mask[[*trained.tokenizer.spoken, trained.tokenizer.eos]] = False
    return mask.to(trained.device)


def prompt_batch(trained: TrainedModel, prompts: list[Segment]) -> Batch:
    """All prompts as the segments of one pack without padding."""
    length = sum(prompt.length for prompt in prompts)
    vision = trained.recipe.model.vision
    patches = max(sum(prompt.patch_count for prompt in prompts), vision.merge**2)  # the encoder needs at least one cell
    shape = PackShape(length, patches, vision.patch_size, vision.merge, SpeechShape.of(trained.recipe))
    return collate([assemble(prompts, shape)]).to(trained.device)


def _draws(seed: int, prompt: Segment, count: int) -> np.ndarray:
    """Uniform in [0, 1), float64 [count], from the seed and the prompt's content, not its place in the batch."""
    digest = hashlib.sha256(prompt.tokens.tobytes())
    for picture in prompt.pictures:
        digest.update(np.ascontiguousarray(picture.patches).data)
    if prompt.recording is not None:
        digest.update(np.ascontiguousarray(prompt.recording.mel).data)
    return np.random.default_rng([seed, int.from_bytes(digest.digest()[:8], "little")]).random(count)
