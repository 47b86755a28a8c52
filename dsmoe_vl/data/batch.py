"""The input of the model. Letters as in `segment.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass
class Batch:
    """B packs, flattened: every index is into T = B * L tokens, the used patches of all packs, and their cells.

    The number of tokens is fixed: every rank routes and exchanges equally many. Unused patches are left out, because no
    collective depends on their number; at least one cell stays. cu_segments int32 [S + 1] and cu_pictures int32 [N + 1]
    are cumulative lengths of segments and pictures; the padding at the end of a pack counts as a segment. max_segment,
    max_picture: the greatest length, a python int. cell_position and cell_frame are in 0..T; T means padding. Retrieval
    pairs and frames are those of all packs. `pairs_of_ranks`: the number of pairs of each rank in this micro-step,
    because embeddings are compared across ranks.

    Of models that hear: mel float32 [F, M], the log-mel frames of all recordings, at least one cell of silence;
    cu_recordings int32 [R + 1] and max_recording, their lengths in states of the encoder; speech_position int64, the
    token in 0..T of each of their cells. They have no rows in other models.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    task_ids: torch.Tensor
    modality_ids: torch.Tensor
    real: torch.Tensor
    cu_segments: torch.Tensor
    max_segment: int
    patches: torch.Tensor
    patch_positions: torch.Tensor
    cu_pictures: torch.Tensor
    max_picture: int
    cell_position: torch.Tensor
    cell_weight: torch.Tensor
    cell_time: torch.Tensor
    cell_frame: torch.Tensor
    cell_frame_weight: torch.Tensor
    mel: torch.Tensor
    cu_recordings: torch.Tensor
    max_recording: int
    speech_position: torch.Tensor
    media_embedding: torch.Tensor
    text_embedding: torch.Tensor
    pair_ids: torch.Tensor
    frame_tokens: torch.Tensor
    importance: torch.Tensor
    ranked: torch.Tensor
    counts: dict[str, int]
    keys: list[str]
    pairs_of_ranks: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, which can be copied to a GPU asynchronously."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)
