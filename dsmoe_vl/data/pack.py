"""Segments -> packs of fixed shape -> flat batches.

Letters as in `segment.py`: L tokens and P patches a pack, Q = P / merge**2 cells a pack, C bytes a patch, B packs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from dsmoe_vl.data.segment import IGNORE, Batch, Modality, Pack, Segment, TaskId
from dsmoe_vl.data.stream import SampleRef
from dsmoe_vl.errors import DataError

_FULL = 0.985  # a pack with this share of its tokens or patches used is not worth waiting for a better fit


@dataclass(frozen=True)
class PackShape:
    """The fixed sizes of a pack: tokens, patches, pixels along a patch, patches along a cell."""

    length: int
    patches: int
    patch_size: int
    merge: int


@dataclass(frozen=True, eq=False)
class Encoded:
    """A sample's segments, which go into one pack together."""

    ref: SampleRef
    key: str
    segments: list[Segment]
    length: int  # tokens
    patches: int


def encoded(ref: SampleRef, key: str, segments: list[Segment], shape: PackShape) -> Encoded:
    """Measure a sample. Raises DataError where it has no tokens or exceeds a whole pack."""
    length = sum(segment.length for segment in segments)
    patches = sum(segment.patch_count for segment in segments)
    if length == 0:
        raise DataError(f"empty sample: {key} gives no tokens")
    if length > shape.length or patches > shape.patches:
        raise DataError(
            f"longer than pack: {key} has {length} tokens and {patches} patches, data.pack_length is "
            f"{shape.length} and data.pack_patches {shape.patches}"
        )
    return Encoded(ref, key, segments, length, patches)


class Packer:
    """Best fit over the samples that are waiting; a function of the samples' order and sizes alone."""

    def __init__(self, shape: PackShape, lookahead: int) -> None:
        """At most `lookahead` samples wait between packs."""
        self._shape = shape
        self._lookahead = lookahead
        self.pending: list[Encoded] = []  # oldest first

    def fill(self, draw: Callable[[], Encoded | None]) -> list[Encoded]:
        """The samples of the next pack; [] when `draw` has ended (None) and nothing waits.

        The oldest sample that waits always goes in, so none waits forever. Then the longest that fits, and where none
        does, new samples are drawn until one fits or `lookahead` of them wait.
        """
        chosen: list[Encoded] = []
        length, patches = self._shape.length, self._shape.patches
        while length > (1 - _FULL) * self._shape.length and patches >= (1 - _FULL) * self._shape.patches:
            fitting = [item for item in self.pending if item.length <= length and item.patches <= patches]
            if fitting:
                item = max(fitting, key=lambda item: item.length) if chosen else self.pending[0]
                self.pending.remove(item)
                chosen.append(item)
                length -= item.length
                patches -= item.patches
            elif len(self.pending) < self._lookahead and (drawn := draw()) is not None:
                self.pending.append(drawn)
            else:
                break
        return chosen


def assemble(segments: Sequence[Segment], shape: PackShape, keys: Sequence[str] = ()) -> Pack:
    """Lay `segments` one after another into a pack; without any, a pack of padding that has no labels.

    `keys` names the samples that they come from.
    """
    length, cells = shape.length, shape.patches // shape.merge**2
    tokens = np.zeros(length, np.int64)
    labels = np.full(length, IGNORE, np.int64)
    positions = np.zeros(length, np.int64)
    task_ids = np.zeros(length, np.int64)
    modality_ids = np.full(length, Modality.TEXT, np.int64)
    patches = np.zeros((shape.patches, 3 * shape.patch_size**2), np.uint8)
    patch_positions = np.zeros((shape.patches, 2), np.int64)
    cell_position = np.full(cells, length, np.int64)
    cell_time = np.full(cells, -1, np.float32)
    counts = {"tokens": 0} | {task.name.lower(): 0 for task in TaskId}
    picture_lengths: list[int] = []

    end = patch_end = cell_end = 0
    for segment in segments:
        start, end = end, end + segment.length
        tokens[start:end] = segment.tokens
        labels[start:end] = segment.labels
        positions[start:end] = np.arange(segment.length)
        task_ids[start:end] = segment.task
        modality_ids[start:end] = segment.modality
        counts[segment.task.name.lower()] += int(np.count_nonzero(segment.labels != IGNORE))
        for picture in segment.pictures:
            count = len(picture.patches)
            patch_start, patch_end = patch_end, patch_end + count
            cell_start, cell_end = cell_end, cell_end + len(picture.cell_token)
            patches[patch_start:patch_end] = picture.patches
            patch_positions[patch_start:patch_end] = grid_positions(picture.grid, shape.merge)
            cell_position[cell_start:cell_end] = start + picture.cell_token
            cell_time[cell_start:cell_end] = picture.time_seconds
            picture_lengths.append(count)
    counts["tokens"] = end

    cells_on_token = np.bincount(cell_position, minlength=length + 1)
    cell_weight = (1.0 / cells_on_token[cell_position]).astype(np.float32)
    cell_weight[cell_end:] = 0
    return Pack(
        tokens=tokens,
        labels=labels,
        positions=positions,
        task_ids=task_ids,
        modality_ids=modality_ids,
        real=np.arange(length) < end,
        segment_lengths=[segment.length for segment in segments],
        patches=patches,
        patch_positions=patch_positions,
        picture_lengths=picture_lengths,
        cell_position=cell_position,
        cell_weight=cell_weight,
        cell_time=cell_time,
        counts=counts,
        keys=list(keys),
    )


def collate(packs: Sequence[Pack]) -> Batch:
    """Flatten packs of one shape into a batch, without their unused patches.

    Where no pack holds a picture, the patches of one cell stay: the encoder runs on every rank at every step.
    """
    length = len(packs[0].tokens)
    cell_size = len(packs[0].patches) // len(packs[0].cell_position)
    segments = [n for pack in packs for n in [*pack.segment_lengths, length - sum(pack.segment_lengths)] if n]
    pictures = [n for pack in packs for n in pack.picture_lengths] or [cell_size]
    used = [sum(pack.picture_lengths) for pack in packs]
    used[0] = max(used[0], cell_size if sum(used) == 0 else 0)
    cell_position = np.concatenate(
        [
            np.where(position < length, position + b * length, len(packs) * length)
            for b, position in enumerate(
                pack.cell_position[: n // cell_size] for pack, n in zip(packs, used, strict=True)
            )
        ]
    )

    def flat(name: str, unit: int = 0) -> torch.Tensor:
        """Tokens, or with a `unit` the used patches in units of that many."""
        cuts = [n // unit if unit else length for n in used]
        return torch.from_numpy(
            np.concatenate([getattr(pack, name)[:cut] for pack, cut in zip(packs, cuts, strict=True)])
        )

    return Batch(
        tokens=flat("tokens"),
        labels=flat("labels"),
        positions=flat("positions"),
        task_ids=flat("task_ids"),
        modality_ids=flat("modality_ids"),
        real=flat("real"),
        cu_segments=_cumulative(segments),
        max_segment=max(segments),
        patches=flat("patches", 1),
        patch_positions=flat("patch_positions", 1),
        cu_pictures=_cumulative(pictures),
        max_picture=max(pictures),
        cell_position=torch.from_numpy(cell_position),
        cell_weight=flat("cell_weight", cell_size),
        cell_time=flat("cell_time", cell_size),
        counts={name: sum(pack.counts[name] for pack in packs) for name in packs[0].counts},
        keys=[key for pack in packs for key in pack.keys],
    )


@lru_cache(maxsize=4096)
def grid_positions(grid: tuple[int, int], merge: int) -> np.ndarray:
    """(row, column) of every patch of a picture in the order of `to_patches`: int64 [p, 2], read-only."""
    rows, columns = grid
    row, column = np.mgrid[:rows, :columns]
    place = np.stack([row, column], axis=-1).reshape(rows // merge, merge, columns // merge, merge, 2)
    positions = place.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    positions.setflags(write=False)
    return positions


def _cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
