"""Greedy generation with a key-value cache, for several prompts at a time.

Shapes: S prompts, T tokens of all prompts, G key/value heads, d head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.data.segment import Sample, Segment
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.model.attention import KeyValueCache
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.tasks.pictures import PictureReader


def caption(trained: TrainedModel, samples: list[Sample], max_tokens: int = 64) -> list[str]:
    """One caption a sample. Raises DataError for media that cannot be read."""
    task = CaptionTask(PictureReader(trained.recipe.data, trained.recipe.model.vision), trained.tokenizer)
    prompts = [task.prompt(sample) for sample in samples]
    return [trained.tokenizer.decode(ids) for ids in generate(trained, prompts, max_tokens)]


@torch.inference_mode()
def generate(trained: TrainedModel, prompts: list[Segment], max_tokens: int) -> list[list[int]]:
    """The most probable continuation of each prompt, token by token, without the end token; at most `max_tokens`."""
    model, end = trained.model, trained.tokenizer.eos
    batch = prompt_batch(trained, prompts)
    caches = _empty_caches(trained, prompts, max_tokens)
    hidden, _ = model(batch, caches)
    lengths = torch.tensor([prompt.length for prompt in prompts], device=trained.device)
    caches[0].lengths.copy_(lengths)  # one tensor, shared by all layers
    tokens = model.head(hidden[lengths.cumsum(0) - 1]).argmax(-1)
    task_ids = torch.tensor([prompt.task for prompt in prompts], device=trained.device)
    written = [tokens]
    finished = tokens == end
    while len(written) < max_tokens and not bool(finished.all()):
        hidden = model.extend(tokens, caches[0].lengths, task_ids, caches)
        caches[0].lengths.add_(1)
        tokens = model.head(hidden).argmax(-1)
        finished = finished | (tokens == end)
        written.append(tokens)
    return [_until(row, end) for row in torch.stack(written, dim=1).tolist()]


def prompt_batch(trained: TrainedModel, prompts: list[Segment]) -> Batch:
    """All prompts as the segments of one pack without padding."""
    length = sum(prompt.length for prompt in prompts)
    vision = trained.recipe.model.vision
    patches = max(sum(prompt.patch_count for prompt in prompts), vision.merge**2)  # the encoder runs on one cell
    shape = PackShape(length, patches, vision.patch_size, vision.merge)
    return collate([assemble(prompts, shape)]).to(trained.device)


def _empty_caches(trained: TrainedModel, prompts: list[Segment], max_tokens: int) -> list[KeyValueCache]:
    model = trained.recipe.model
    capacity = max(prompt.length for prompt in prompts) + max_tokens
    shape = (len(prompts), capacity, model.kv_heads, model.width // model.heads)
    dtype = trained.model.embedding.weight.dtype
    lengths = torch.zeros(len(prompts), dtype=torch.int64, device=trained.device)

    def empty() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=trained.device)

    return [KeyValueCache(empty(), empty(), lengths) for _ in range(model.layers)]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
