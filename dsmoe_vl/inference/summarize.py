"""Video summaries: the text, and how much each frame matters. f: frames that the model has seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.inference.generate import CachedDecoder, continuations
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.media import encode_all
from dsmoe_vl.inference.search import GREEDY, Search
from dsmoe_vl.tasks.video_summary import VideoSummaryTask

KEY_SHARE = 0.15  # of the frames: the budget of SumMe and TVSum (Zhang et al. 2016, section 4.1)


@dataclass(frozen=True)
class VideoSummary:
    """Of one video. `seconds` and `importance`, in [0, 1], float32 [f]."""

    text: str
    seconds: np.ndarray
    importance: np.ndarray

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """The importance at other times, in between those seen: linear; constant beyond them."""
        return np.interp(seconds, self.seconds, self.importance)

    def key_frames(self, count: int | None = None) -> list[int]:
        """Numbers of the `count` frames to show, in the order of time; KEY_SHARE of them, rounded up, unless given.

        They are chosen one by one, always the greatest `importance * (1 - exp(-(d / tau) ** 2))`: d is the distance in
        time to the nearest frame that is chosen already, tau half of what `count` frames would lie apart. So one event
        does not fill the summary, and no unimportant frame gets into it for the sake of variety.
        """
        count = min(count or math.ceil(round(KEY_SHARE * len(self.seconds), 9)), len(self.seconds))
        tau = max(float(self.seconds[-1] - self.seconds[0]), 1e-6) / (2 * count)
        chosen: list[int] = []
        worth = self.importance.astype(np.float64)
        for _ in range(count):
            frame = int(worth.argmax())
            chosen.append(frame)
            apart = np.abs(self.seconds[:, None] - self.seconds[chosen]).min(axis=1)
            worth = self.importance * (1 - np.exp(-((apart / tau) ** 2)))
            worth[chosen] = -1
        return sorted(chosen)


@torch.inference_mode()
def summarize(
    trained: TrainedModel, samples: list[Sample], max_tokens: int = 64, search: Search = GREEDY
) -> list[VideoSummary]:
    """One summary a video. Raises ConfigError for a model that has not learned it, DataError for bad media."""
    prompts = encode_all(trained.task(VideoSummaryTask).prompt, samples)
    decoder = CachedDecoder(trained, prompts, max_tokens)
    scores = trained.model.get_submodule("importance")(decoder.hidden[decoder.batch.frame_tokens]).sigmoid().cpu()
    written = continuations(trained, decoder, prompts, max_tokens, search)
    of_videos = scores.split([len(prompt.pictures) for prompt in prompts])
    return [
        VideoSummary(
            trained.tokenizer.decode(ids),
            np.array([picture.time_seconds for picture in prompt.pictures], np.float32),
            importance.numpy(),
        )
        for ids, prompt, importance in zip(written, prompts, of_videos, strict=True)
    ]
