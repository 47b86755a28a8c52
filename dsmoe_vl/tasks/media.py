"""Decodes media into the pictures and the recording of a segment, within the recipe's budgets."""

from __future__ import annotations

import numpy as np

from dsmoe_vl.config.model import FRAMES_OF_STATE, SpeechConfig, VisionConfig
from dsmoe_vl.config.recipe import AugmentConfig, DataConfig, Recipe
from dsmoe_vl.data.augment import Augmentation
from dsmoe_vl.data.contents import media_of, recording_of
from dsmoe_vl.data.decode import decode_image, fit_grid, sampled_frames, to_patches
from dsmoe_vl.data.recording import decode_recording, log_mel, whole_cells
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Recording, Segment
from dsmoe_vl.data.tokenizer import Tokenizer

_PLACEHOLDER = {Modality.IMAGE: "<image>", Modality.VIDEO: "<video>", Modality.SPEECH: "<speech>"}
_DEAF, _NO_AUGMENTATION, _AS_IT_IS = SpeechConfig(), AugmentConfig(), Augmentation()


class MediaReader:
    """Decodes a sample's image or the sampled frames of its video, and cuts them into patches; and its recording into
    log-mel frames."""

    def __init__(
        self, data: DataConfig, vision: VisionConfig, seed: int | None = None, speech: SpeechConfig = _DEAF
    ) -> None:
        """`seed`: of the run, for training, where pictures are augmented; None: pictures are read as they are."""
        self.data, self.vision, self.seed, self.speech = data, vision, seed, speech
        self._last: tuple[Sample, tuple[Modality, list[Picture], int]] | None = None
        self._last_heard: tuple[Sample, np.ndarray] | None = None

    @classmethod
    def of(cls, recipe: Recipe, training: bool) -> MediaReader:
        """The recipe's."""
        return cls(recipe.data, recipe.model.vision, recipe.run.seed if training else None, recipe.model.speech)

    def read(self, sample: Sample) -> tuple[Modality, list[Picture], int]:
        """Modality, pictures and their number of vision tokens. Raises DataError.

        The last sample is cached, so that several tasks in a row decode it once.
        """
        if self._last is None or self._last[0] is not sample:
            self._last = sample, self._decode(sample)
        return self._last[1]

    def hear(self, sample: Sample) -> np.ndarray:
        """The log-mel frames of its recording in whole speech tokens: float32 [f, M]. Raises DataError.

        The last sample's are cached, as in `read`.
        """
        if self._last_heard is None or self._last_heard[0] is not sample:
            waveform = decode_recording(recording_of(sample), self.data.speech_max_seconds)
            self._last_heard = sample, whole_cells(log_mel(waveform, self.speech.bands), self.speech.merge)
        return self._last_heard[1]

    def prompt(
        self, sample: Sample, task: int, tokenizer: Tokenizer, last: str, sees: bool = True, hears: bool = False
    ) -> Segment:
        """The vision tokens of a sample (`sees`), the speech tokens of its recording (`hears`), then the control symbol
        `last`; without labels, after the tokenizer's `begin`. Raises DataError for a sample without one of them."""
        modality, pictures, seen = self.read(sample) if sees else (Modality.TEXT, [], 0)
        recording = Recording(self.hear(sample), first=seen) if hears else None
        heard = 0 if recording is None else len(recording.mel) // (FRAMES_OF_STATE * self.speech.merge)
        tokens = np.full(seen + heard + 1, tokenizer.control(last), dtype=np.int32)
        modalities = np.full_like(tokens, Modality.TEXT)
        for kind, begin, end in ((modality, 0, seen), (Modality.SPEECH, seen, seen + heard)):
            if begin < end:
                tokens[begin:end] = tokenizer.control(_PLACEHOLDER[kind])
                modalities[begin:end] = kind
        segment = Segment(task, tokens, np.full_like(tokens, IGNORE), modalities, pictures, recording=recording)
        return segment.after(tokenizer.begin)

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
        if self.seed is None or self.data.augment == _NO_AUGMENTATION:
            return _AS_IT_IS
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
