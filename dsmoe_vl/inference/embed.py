"""Retrieval embeddings of pictures, videos, texts and recordings. W: embedding width."""

from __future__ import annotations

import numpy as np
import torch

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.inference.generate import prompt_batch
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.media import encode_all
from dsmoe_vl.tasks.retrieval import RetrievalTask
from dsmoe_vl.tasks.retrieval_head import RetrievalEmbeddings


def embed_media(trained: TrainedModel, samples: list[Sample]) -> np.ndarray:
    """Unit vectors, float32 [n, W]. Raises ConfigError for a model without retrieval, DataError for bad media."""
    task = retrieval_task(trained)
    return embed_media_segments(trained, encode_all(task.media, samples))


def embed_media_segments(trained: TrainedModel, segments: list[Segment]) -> np.ndarray:
    """As `embed_media`, from segments of `RetrievalTask.media`."""
    return _embed(trained, segments).media.numpy()


def embed_texts(trained: TrainedModel, texts: list[str]) -> np.ndarray:
    """Unit vectors, float32 [n, W]. Raises ConfigError for a model without retrieval."""
    task = retrieval_task(trained)
    return _embed(trained, [task.text(text) for text in texts]).text.numpy()


def embed_recordings(trained: TrainedModel, samples: list[Sample]) -> np.ndarray:
    """Unit vectors of spoken queries, in the space of texts. Raises ConfigError for a model without retrieval or a
    speech encoder, DataError for a sample without a readable recording."""
    task = retrieval_task(trained)
    if not trained.recipe.model.hears:
        raise ConfigError(
            f"{trained.checkpoint} has no speech encoder: name a run whose recipe has model.speech.layers above 0"
        )
    return _embed(trained, encode_all(task.spoken, samples)).text.numpy()


def retrieval_task(trained: TrainedModel) -> RetrievalTask:
    """The model's retrieval task. Raises ConfigError if the model has not learned it."""
    return trained.task(RetrievalTask)


@torch.inference_mode()
def _embed(trained: TrainedModel, segments: list[Segment]) -> RetrievalEmbeddings:
    """Both projections of each segment; the caller takes the one it needs."""
    batch = prompt_batch(trained, segments)
    hidden, _ = trained.model(batch)
    ends = torch.tensor([segment.length for segment in segments], device=hidden.device).cumsum(0) - 1
    embedded = trained.model.get_submodule("retrieval")(hidden, ends, ends, batch.cu_segments)
    return RetrievalEmbeddings(*(value.cpu() for value in embedded))
