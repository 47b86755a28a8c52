"""What flows from samples to the model: segments -> pack, and in `batch.py` -> batch.

Shapes: n tokens of a segment, p patches, C = 3 * patch_size**2 bytes a patch, L tokens a pack, P patches a pack,
Q = P / merge**2 cells a pack (a cell is merge x merge neighbouring patches: one vision token), B packs, T = B * L.
Patches are ordered so that the merge**2 patches of a cell are adjacent; cells run row by row.

Without torch, whose import takes seconds that the data tools' processes can do without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from dsmoe_vl.config.task_table import all_terms

IGNORE = -100  # label of a position without a language-model target


class Modality(IntEnum):
    """Of a token; its row of the router's modality bias."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2


# What a batch counts: real tokens, in all and by modality, language-model targets, and the targets of every loss term.
TOKENS_OF = {modality: f"tokens_{modality.name.lower()}" for modality in Modality}
COUNTS = ("tokens", *TOKENS_OF.values(), "labels", *(term.name for term in all_terms()))


@dataclass
class Picture:
    """One image or one frame, cut into patches.

    `patches` uint8 [p, C]; `grid` patch rows and columns, both multiples of merge; `time_seconds` is -1 for a still
    image; `cell_token` int32 [p / merge**2]: the token of the segment that receives each cell (several cells on one
    token are averaged). `frame_token`: the token that receives the mean of all cells once more, -1 for none.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    time_seconds: float
    cell_token: np.ndarray
    frame_token: int = -1


@dataclass
class Segment:
    """A run of tokens that attend only to each other: `tokens`, `labels`, `modality` int32 [n].

    `task`: its number, see `config/task_table.py`.

    `labels[i]` is the target that is predicted *at* position i (already shifted), or IGNORE.
    `pair`: the id of a retrieval pair of which this is one side, with pictures or without; its last token is the
    embedding token. -1 for none.
    `importance` float32 [f]: the truth in [0, 1] at the frame token of each picture; empty without frame tokens.
    `ranked` int32 [r, 2]: pairs of frames to be compared, the more important one first.
    """

    task: int
    tokens: np.ndarray
    labels: np.ndarray
    modality: np.ndarray
    pictures: list[Picture] = field(default_factory=list)
    pair: int = -1
    importance: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    ranked: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def patch_count(self) -> int:
        return sum(len(picture.patches) for picture in self.pictures)


@dataclass
class Pack:
    """One fixed-shape row of a batch, as numpy arrays.

    tokens, labels, positions, task_ids, modality_ids int64 [L]; real bool [L]; segment_lengths: their sum <= L, the
    tail is padding. picture_lengths: patches of each picture, their sum <= P. patches: uint8 [p, C] of each picture, or
    where there is none one cell of zeros; patch_positions int64 [P, 2] (row, column).
    cell_position int64 [Q] in 0..L, L meaning "padding, goes nowhere"; cell_weight float32 [Q] (1 / cells on the same
    token, 0 in padding); cell_time float32 [Q] seconds, -1 for still images and padding. cell_frame int64 [Q] in 0..L
    and cell_frame_weight float32 [Q]: the same for the frame tokens.
    media_embedding, text_embedding, pair_ids int64 [n]: the embedding tokens of each retrieval pair and its id.
    frame_tokens int64 [f], importance float32 [f], ranked int64 [r, 2] (rows of these two): of the video summaries.
    counts: COUNTS, python ints, for the global normalisation.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    task_ids: np.ndarray
    modality_ids: np.ndarray
    real: np.ndarray
    segment_lengths: list[int]
    patches: list[np.ndarray]
    patch_positions: np.ndarray
    picture_lengths: list[int]
    cell_position: np.ndarray
    cell_weight: np.ndarray
    cell_time: np.ndarray
    cell_frame: np.ndarray
    cell_frame_weight: np.ndarray
    media_embedding: np.ndarray
    text_embedding: np.ndarray
    pair_ids: np.ndarray
    frame_tokens: np.ndarray
    importance: np.ndarray
    ranked: np.ndarray
    counts: dict[str, int]
    keys: list[str]
    lane: int = 0
    lane_state: dict[str, Any] = field(default_factory=dict)  # the lane's state after this pack
