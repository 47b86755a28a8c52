"""Video summarization: the vision tokens of all frames, one frame token per frame, the task token, then the summary.

token   <video> * n  <frame> * f  <summary>  "a"  "dog"  "barks"

All vision tokens come before the frame tokens, so that every frame token attends to the whole video. A frame token also
receives the features of its own frame, which identify the frame.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_vl.config.task_table import SummaryConfig, task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.tasks.language import followed_by, language_loss
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.task import TaskOutput

_LEAST_SECONDS = 1e-3  # minimum duration of an annotated video
_NUMBER = task_number("summary")


class ImportanceHead(nn.Module):
    """Importance of each frame, read at its frame token: hidden [F, D] -> logits, fp32 [F]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.score(hidden).float().squeeze(-1)


class VideoSummaryTask:
    """Token layout: see the module docstring."""

    name: str = "summary"

    def __init__(
        self, reader: MediaReader, tokenizer: Tokenizer, settings: SummaryConfig, training: bool = True
    ) -> None:
        self.reader = reader
        self.tokenizer = tokenizer
        self.margin = settings.ranking_margin

    @staticmethod
    def heads(settings: SummaryConfig, width: int) -> dict[str, nn.Module]:
        """The importance head."""
        return {"importance": ImportanceHead(width)}

    def encode(self, sample: Sample) -> list[Segment]:
        """One segment. Raises DataError if the sample is not a video, or has no summary or no importance."""
        contents = contents_of(sample)
        if not contents.summary:
            raise DataError(contents.no_summary)
        prompt = self.prompt(sample)
        prompt.importance = importance_at(sample, [picture.time_seconds for picture in prompt.pictures])
        prompt.ranked = ranked_pairs(prompt.importance, self.margin)
        return [followed_by(prompt, self.tokenizer.encode(contents.summary), self.tokenizer.eos)]

    def prompt(self, sample: Sample) -> Segment:
        """The prompt for generation: the segment up to and including the task token. Raises DataError."""
        modality, pictures, vision_tokens = self.reader.read(sample)
        if modality is not Modality.VIDEO:
            raise DataError("no video to summarize")
        length = vision_tokens + len(pictures)
        tokens, modalities = self.reader.placeholders(modality, length, self.tokenizer, "<summary>")
        tokens[vision_tokens:length] = self.tokenizer.control("<frame>")
        numbered = [
            Picture(picture.patches, picture.grid, picture.time_seconds, picture.cell_token, vision_tokens + i)
            for i, picture in enumerate(pictures)
        ]
        segment = Segment(_NUMBER, tokens, np.full_like(tokens, IGNORE), modalities, numbered)
        return segment.after(self.tokenizer.begin)

    def loss(self, model: VisionLanguageModel, hidden: Tensor, batch: Batch) -> TaskOutput:
        """Sums over summary targets (cross entropy), frames (squared error) and ranked pairs (logistic)."""
        scores = model.get_submodule("importance")(hidden.index_select(0, batch.frame_tokens))
        more, less = batch.ranked.unbind(1)
        return TaskOutput(
            {
                "summary": language_loss(model, hidden, batch, _NUMBER),
                "importance": (scores.sigmoid() - batch.importance).square().sum(),
                # RankNet (Burges et al. 2005, eq. 3) with a target probability of 1.
                "ranking": F.softplus(scores.index_select(0, less) - scores.index_select(0, more)).sum(),
            }
        )


def importance_at(sample: Sample, seconds: list[float]) -> np.ndarray:
    """Importance at the given times, mean over annotators, in [0, 1]: float32 [f]. Raises DataError."""
    mean, duration = importance_curve(sample)
    # Frame times are rounded: a time on a border belongs to the part that begins there.
    parts = (np.asarray(seconds) / duration * len(mean) + 1e-6).astype(int)
    return mean[parts.clip(0, len(mean) - 1)]


def importance_curve(sample: Sample) -> tuple[np.ndarray, float]:
    """Importance of each equal part of the video, mean over annotators, float32 in [0, 1], and the duration in seconds.

    Raises DataError as `annotated_curves` does.
    """
    annotators, duration = annotated_curves(sample)
    return annotators.mean(axis=0, dtype=np.float32), duration


def annotated_curves(sample: Sample) -> tuple[np.ndarray, float]:
    """Importance of each equal part of the video by annotator, float32 [annotators, parts] in [0, 1], and the duration
    in seconds.

    From KEY.json: `importance`, one number per part, or `saliency`, one such list per annotator; and
    `duration_seconds`. Raises DataError if they are missing or invalid.
    """
    meta = sample.meta
    try:
        annotators = np.atleast_2d(np.asarray(meta.get("saliency") or meta.get("importance"), dtype=np.float64))
        duration = float(meta["duration_seconds"])
    except (TypeError, ValueError, KeyError, OverflowError):
        raise DataError("no importance of frames") from None
    known = annotators.size > 0 and annotators.ndim == 2 and np.isfinite(annotators).all()
    if not known or not _LEAST_SECONDS <= duration < float("inf"):
        raise DataError("no importance of frames")
    if annotators.min() < 0 or annotators.max() > 1:
        raise DataError(f"importance outside of 0 to 1: {annotators.min():g} to {annotators.max():g}")
    return annotators.astype(np.float32), duration


def ranked_pairs(importance: np.ndarray, margin: float) -> np.ndarray:
    """Pairs of frames (more, less important) that differ by more than `margin`: float32 [f] -> int32 [r, 2]."""
    return np.argwhere(importance[:, None] - importance[None, :] > margin).astype(np.int32)
