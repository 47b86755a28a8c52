"""Video summaries: the text, and how much each frame matters. f: frames that the model has seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsmoe_vl.data.segment import Sample
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.inference.generate import generate, prompt_batch
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.tasks.pictures import PictureReader
from dsmoe_vl.tasks.video_summary import VideoSummaryTask


@dataclass(frozen=True)
class VideoSummary:
    """Of one video. `seconds` and `importance`, in [0, 1], float32 [f]."""

    text: str
    seconds: np.ndarray
    importance: np.ndarray

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """The importance at other times, in between those seen: linear; constant beyond them."""
        return np.interp(seconds, self.seconds, self.importance)


@torch.inference_mode()
def summarize(trained: TrainedModel, samples: list[Sample], max_tokens: int = 64) -> list[VideoSummary]:
    """One summary a video. Raises ConfigError for a model that has not learned it, DataError for bad media."""
    config = trained.recipe.tasks.summary
    if not config.weight:
        raise ConfigError(f"{trained.checkpoint} has not learned video summaries: tasks.summary.weight was 0")
    pictures = PictureReader(trained.recipe.data, trained.recipe.model.vision)
    task = VideoSummaryTask(pictures, trained.tokenizer, config)
    prompts = [task.prompt(sample) for sample in samples]
    batch = prompt_batch(trained, prompts)
    hidden, _ = trained.model(batch)
    scores = trained.model.importance(hidden[batch.frame_tokens]).sigmoid().cpu()
    texts = [trained.tokenizer.decode(ids) for ids in generate(trained, prompts, max_tokens)]
    of_videos = scores.split([len(prompt.pictures) for prompt in prompts])
    return [
        VideoSummary(text, np.array([p.time_seconds for p in prompt.pictures], np.float32), importance.numpy())
        for text, prompt, importance in zip(texts, prompts, of_videos, strict=True)
    ]
