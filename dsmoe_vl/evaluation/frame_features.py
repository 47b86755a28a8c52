"""Features of video frames from a run's vision encoder, to cut a video into shots."""

from __future__ import annotations

import numpy as np
import torch

from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.decode import fit_grid, iterate_video, to_patches
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Segment
from dsmoe_vl.errors import DataError
from dsmoe_vl.inference.generate import prompt_batch
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.model.attention import SegmentLayout

_BATCH_FRAMES = 32


def frame_features(trained: TrainedModel, sample: Sample, frames: int) -> np.ndarray:
    """The encoder's output, averaged over the patches of each frame, float32 [F, Dv]. F: `frames`, or all if the video
    has fewer; each frame is from the middle of an equal part of the video. The decoder is not run.

    Only a few frames are in memory at a time. Raises DataError if the sample is not a video or cannot be read.
    """
    if sample.media is None or not sample.is_video:
        raise DataError("no video to cut into shots")
    vision, budget = trained.recipe.model.vision, trained.recipe.data.frame_max_patches
    features: list[np.ndarray] = []
    waiting: list[Picture] = []
    for seconds, pixels in iterate_video(sample.media, frames):
        grid = fit_grid(pixels.shape[1], pixels.shape[0], vision.patch_size, vision.merge, budget)
        patches = to_patches(pixels, grid, vision.patch_size, vision.merge)
        waiting.append(Picture(patches, grid, seconds, np.zeros(len(patches) // vision.merge**2, np.int32)))
        if len(waiting) == _BATCH_FRAMES:
            features.append(_encode(trained, waiting))
            waiting = []
    if waiting:
        features.append(_encode(trained, waiting))
    return np.concatenate(features)


@torch.inference_mode()
def _encode(trained: TrainedModel, pictures: list[Picture]) -> np.ndarray:
    one = np.zeros(1, np.int32)  # a placeholder for the decoder's tokens, which are not used
    batch = prompt_batch(trained, [Segment(task_number("summary"), one, one + IGNORE, one + Modality.VIDEO, pictures)])
    layout = SegmentLayout(batch.cu_pictures, batch.max_picture)
    features = trained.model.vision(batch.patches, batch.patch_positions, layout)[0].float().cpu()
    return torch.stack([part.mean(dim=0) for part in features.split([len(p.patches) for p in pictures])]).numpy()
