"""The fixed sizes of a pack."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsmoe_vl.config.model import FRAMES_OF_STATE
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.recording import FRAMES_A_SECOND


@dataclass(frozen=True)
class SpeechShape:
    """Of packs for a model that hears: frames of all recordings, frames of one cell (a speech token), mel bands."""

    frames: int
    cell: int
    bands: int

    @classmethod
    def of(cls, recipe: Recipe) -> SpeechShape | None:
        """The recipe's; None for a model without a speech encoder."""
        speech = recipe.model.speech
        if not recipe.model.hears:
            return None
        longest = max(recipe.data.pack_speech_seconds, recipe.data.speech_max_seconds)
        cell = speech.merge * FRAMES_OF_STATE
        # A recording may end with one more cell, see `data/recording.py: cells_of`.
        return cls((math.ceil(longest * FRAMES_A_SECOND / cell) + 1) * cell, cell, speech.bands)


@dataclass(frozen=True)
class PackShape:
    """The fixed sizes of a pack: tokens, patches, pixels of a patch's side, patches of a cell's side; and of speech."""

    length: int
    patches: int
    patch_size: int
    merge: int
    speech: SpeechShape | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> PackShape:
        """The recipe's."""
        data, vision = recipe.data, recipe.model.vision
        return cls(data.pack_length, data.pack_patches, vision.patch_size, vision.merge, SpeechShape.of(recipe))

    @property
    def frames(self) -> int:
        """Log-mel frames of all recordings, at most."""
        return 0 if self.speech is None else self.speech.frames
