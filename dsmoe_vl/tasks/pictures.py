"""Decodes media into the pictures of a segment, within the recipe's patch budgets."""

from __future__ import annotations

import numpy as np

from dsmoe_vl.config.model import VisionConfig
from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.augment import Augmentation
from dsmoe_vl.data.contents import media_of
from dsmoe_vl.data.decode import decode_image, fit_grid, sampled_frames, to_patches
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Modality, Picture
from dsmoe_vl.data.tokenizer import Tokenizer

_PLACEHOLDER = {Modality.IMAGE: "<image>", Modality.VIDEO: "<video>"}


class PictureReader:
    """Decodes a sample's image or the sampled frames of its video, and cuts them into patches."""

    def __init__(self, data: DataConfig, vision: VisionConfig, seed: int | None = None) -> None:
        """`seed`: of the run, for training, where pictures are augmented; None: pictures are read as they are."""
        self.data, self.vision, self.seed = data, vision, seed
        self._last: tuple[Sample, tuple[Modality, list[Picture], int]] | None = None

    def read(self, sample: Sample) -> tuple[Modality, list[Picture], int]:
        """Modality, pictures and their number of vision tokens. Raises DataError.

        The last sample is cached, so that several tasks in a row decode it once.
        """
        if self._last is None or self._last[0] is not sample:
            self._last = sample, self._decode(sample)
        return self._last[1]

    @staticmethod
    def placeholders(
        modality: Modality, vision_tokens: int, tokenizer: Tokenizer, last: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and modalities, int32 [vision_tokens + 1] each: the vision tokens, then the control symbol `last`."""
        tokens = np.full(vision_tokens + 1, tokenizer.control(_PLACEHOLDER[modality]), dtype=np.int32)
        tokens[-1] = tokenizer.control(last)
        modalities = np.full(vision_tokens + 1, modality, dtype=np.int32)
        modalities[-1] = Modality.TEXT
        return tokens, modalities

    def _decode(self, sample: Sample) -> tuple[Modality, list[Picture], int]:
        media = media_of(sample)
        augmentation = self._augmentation(sample)
        if not sample.is_video:
            image = decode_image(media, self.data.image_max_patches * self.vision.patch_size**2)
            grid = self._grid(image, self.data.image_max_patches)
            cells = np.arange(self._cells(grid), dtype=np.int32)
            return Modality.IMAGE, [Picture(self._cut(image, grid, augmentation), grid, -1.0, cells)], len(cells)
        pictures: list[Picture] = []
        used = 0
        for seconds, frame in sampled_frames(sample, self.data):
            grid = self._grid(frame, self.data.frame_max_patches)
            tokens = self._pooled_tokens(grid)
            pictures.append(Picture(self._cut(frame, grid, augmentation), grid, seconds, tokens + used))
            used += int(tokens[-1]) + 1
        return Modality.VIDEO, pictures, used

    def _augmentation(self, sample: Sample) -> Augmentation:
        if self.seed is None:
            return Augmentation()
        return Augmentation.choose(self.data.augment, self.seed, sample.source.name, sample.key, sample.epoch)

    def _grid(self, pixels: np.ndarray, budget: int) -> tuple[int, int]:
        return fit_grid(pixels.shape[1], pixels.shape[0], self.vision.patch_size, self.vision.merge, budget)

    def _cut(self, pixels: np.ndarray, grid: tuple[int, int], augmentation: Augmentation) -> np.ndarray:
        height, width = (side * self.vision.patch_size for side in grid)
        pixels = augmentation.apply(pixels, height, width)
        return to_patches(pixels, grid, self.vision.patch_size, self.vision.merge)

    def _cells(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] // self.vision.merge**2

    def _pooled_tokens(self, grid: tuple[int, int]) -> np.ndarray:
        """Token index of each cell if pool x pool neighbouring cells share a token: int32 [cells], row-major."""
        pool = self.data.frame_pool
        rows, columns = (np.arange(side // self.vision.merge) // pool for side in grid)
        return (rows[:, None] * (columns[-1] + 1) + columns[None, :]).ravel().astype(np.int32)
