"""Video summaries: a text, and the importance of each frame. f: sampled frames."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.inference.generate import MAX_TOKENS, CachedDecoder, continuations
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.media import encode_all
from dsmoe_vl.inference.token_search import GREEDY, Search
from dsmoe_vl.tasks.video_summary import VideoSummaryTask

KEY_SHARE = 0.15  # of the frames become key frames: the budget of SumMe and TVSum (Zhang et al. 2016, section 4.1)


@dataclass(frozen=True)
class VideoSummary:
    """Summary of one video. `seconds` and `importance` (0 to 1): float32 [f]."""

    text: str
    seconds: np.ndarray
    importance: np.ndarray

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """Importance at other times: linear interpolation, constant beyond the sampled frames."""
        return np.interp(seconds, self.seconds, self.importance)

    def key_frames(self, count: int | None = None) -> list[int]:
        """Indices of `count` key frames in order of time; default: KEY_SHARE of all frames, rounded up.

        They are chosen greedily by the greatest `importance * (1 - exp(-(d / tau) ** 2))`: d is the distance in time to
        the nearest chosen frame, tau half the distance between `count` evenly spaced frames. So one event does not fill
        the summary, and no unimportant frame is chosen only for variety.
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
    trained: TrainedModel, samples: list[Sample], max_tokens: int = MAX_TOKENS, search: Search = GREEDY
) -> list[VideoSummary]:
    """One summary per video. Raises ConfigError if the model has not learned it, DataError for unreadable media."""
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
