"""The data types from samples to the model: segments -> pack -> batch (in `batch.py`).

Shapes: n tokens of a segment, p patches, C = 3 * patch_size**2 bytes per patch, L tokens and P patches per pack,
Q = P / merge**2 cells per pack (a cell is merge x merge neighbouring patches: one vision token), B packs, T = B * L;
f log-mel frames of a recording, M mel bands.
The merge**2 patches of a cell are adjacent; cells are ordered row by row.

Does not import torch: that takes seconds, and the data tools do not need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    SPEECH = 3  # has no row in models without a speech encoder


# Counts of a batch: real tokens, in total and by modality, language-model targets, and the targets of every loss term.
TOKENS_OF = {modality: f"tokens_{modality.name.lower()}" for modality in Modality}
COUNTS = ("tokens", *TOKENS_OF.values(), "labels", *(term.name for term in all_terms()))


@dataclass
class Picture:
    """An image or a frame, cut into patches.

    `patches` uint8 [p, C]; `grid`: patch rows and columns, multiples of merge; `time_seconds`: -1 for an image;
    `cell_token` int32 [p / merge**2]: the token in the segment that receives each cell (cells of one token are
    averaged); `frame_token`: the token that also receives the mean of all cells, -1 for none.
    """

    patches: np.ndarray
    grid: tuple[int, int]
    time_seconds: float
    cell_token: np.ndarray
    frame_token: int = -1


@dataclass
class Recording:
    """A recording of speech: `mel` float32 [f, M], whole speech tokens with the silence at their end, see
    `data/recording.py`; `first`: the token of the segment that receives the first of them, and the next ones follow."""

    mel: np.ndarray
    first: int


@dataclass
class Segment:
    """A run of tokens that attend only to each other: `tokens`, `labels`, `modality` int32 [n].

    `task`: its number, see `config/task_table.py`.
    `labels[i]`: the target predicted at position i (already shifted), or IGNORE.
    `pair`: id of the retrieval pair; the segment is its image or video if it has pictures, else its text. The last
    token is the embedding token. -1 for other segments.
    `importance` float32 [f]: annotated importance in [0, 1] of each picture with a frame token.
    `ranked` int32 [r, 2]: pairs of frames to compare, the more important one first.
    """

    task: int
    tokens: np.ndarray
    labels: np.ndarray
    modality: np.ndarray
    pictures: list[Picture] = field(default_factory=list)
    pair: int = -1
    importance: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    ranked: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    recording: Recording | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def patch_count(self) -> int:
        return sum(len(picture.patches) for picture in self.pictures)

    @property
    def frame_count(self) -> int:
        """Of log-mel frames."""
        return 0 if self.recording is None else len(self.recording.mel)

    def places(self, merge: int) -> np.ndarray:
        """Time, row and column of each token for interleaved MRoPE: int64 [n, 3].

        A text token has the number that follows the largest so far, three times. A vision token has that number as its
        time, and adds its own row and column in the grid of its picture's tokens to it (Wang et al. 2024, section 2.1,
        of Qwen2-VL). Frames are pictures one after another.
        """
        found = np.zeros((self.length, 3), np.int64)
        number = end = 0
        for picture in self.pictures:
            tokens, columns = picture.cell_token, picture.grid[1] // merge
            if tokens[-1] - tokens[0] + 1 == len(tokens):  # each cell has its own
                row, column = np.divmod(np.arange(len(tokens)), columns)
            else:
                # Cells that share a token are neighbours: its place is that of the first, counted in tokens.
                tokens, first = np.unique(tokens, return_index=True)
                row, column = (np.unique(axis, return_inverse=True)[1] for axis in np.divmod(first, columns))
            start = int(tokens[0])
            between = max(start - end, 0)
            found[end : end + between] = number + np.arange(between)[:, None]
            number += between
            end = int(tokens[-1]) + 1
            found[start:end] = number
            found[start:end, 1] += row
            found[start:end, 2] += column
            number += int(max(row.max(), column.max())) + 1
        found[end:] = number + np.arange(self.length - end)[:, None]
        return found

    def after(self, begin: Sequence[int]) -> Segment:
        """This segment after the text tokens `begin`, which have no targets; itself if there are none."""
        if not begin:
            return self
        count = len(begin)

        def shifted(picture: Picture) -> Picture:
            frame = picture.frame_token + count if picture.frame_token >= 0 else -1
            return replace(picture, cell_token=picture.cell_token + count, frame_token=frame)

        return replace(
            self,
            tokens=np.concatenate((np.asarray(begin, dtype=np.int32), self.tokens)),
            labels=np.concatenate((np.full(count, IGNORE, dtype=np.int32), self.labels)),
            modality=np.concatenate((np.full(count, Modality.TEXT, dtype=np.int32), self.modality)),
            pictures=[shifted(picture) for picture in self.pictures],
            recording=self.recording and replace(self.recording, first=self.recording.first + count),
        )


@dataclass
class Pack:
    """One fixed-shape row of a batch, as numpy arrays.

    tokens, labels, positions, task_ids, modality_ids int64 [L]; places int64 [L, 3], see `Segment.places`; real bool
    [L]; segment_lengths: their sum is <= L, the
    rest is padding. picture_lengths: patches of each picture, their sum is <= P. patches: uint8 [p, C] of each picture;
    without pictures one cell of zeros. patch_positions int64 [P, 2] (row, column).
    cell_position int64 [Q] in 0..L, L for padding; cell_weight float32 [Q]: 1 / cells on the same token, 0 for padding;
    cell_time float32 [Q]: seconds, -1 for images and padding. cell_frame int64 [Q] in 0..L and cell_frame_weight
    float32 [Q]: the same for frame tokens.
    mel: float32 [f, M] of each recording; without recordings one cell of zeros, nothing in a model that does not hear.
    speech_position int64: the token of each cell of the recordings.
    media_embedding, text_embedding, pair_ids int64 [n]: the embedding tokens and the id of each retrieval pair.
    frame_tokens int64 [f], importance float32 [f], ranked int64 [r, 2] (indices into these two): of video summaries.
    counts: COUNTS, python ints, for the global normalisation.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    places: np.ndarray
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
    mel: list[np.ndarray]
    speech_position: np.ndarray
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
