"""Segments -> packs of fixed shape -> flat batches.

Letters as in `segment.py`: L tokens, P patches and Q = P / merge**2 cells per pack, C bytes per patch, B packs, f
log-mel frames of a recording, M mel bands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch

from dsmoe_vl.config.model import FRAMES_OF_STATE
from dsmoe_vl.config.task_table import TASKS, Targets
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.recording import FRAMES_A_SECOND
from dsmoe_vl.data.segment import COUNTS, IGNORE, TOKENS_OF, Modality, Pack, Segment
from dsmoe_vl.data.stream import SampleRef
from dsmoe_vl.errors import DataError

_LAST = 2.2  # times the longest sample: up to this length the rest of a pack is filled by two samples
_FULL = 0.985  # share of tokens or patches from which a pack counts as full
# How many targets a segment has, by the kind of target that a term of its task counts.
_TARGETS: dict[Targets, Callable[[Segment], int]] = {
    "labels": lambda segment: int(np.count_nonzero(segment.labels != IGNORE)),
    "pairs": lambda segment: int(segment.pair >= 0 and bool(segment.pictures)),  # counted at its side with pictures
    "frames": lambda segment: sum(picture.frame_token >= 0 for picture in segment.pictures),
    "comparisons": lambda segment: len(segment.ranked),
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """The segments of a sample, which stay together in one pack."""

    ref: SampleRef
    key: str
    segments: list[Segment]
    length: int  # tokens
    patches: int
    frames: int = 0  # of its recordings


def encoded(ref: SampleRef, key: str, segments: list[Segment], shape: PackShape) -> Encoded:
    """Measure a sample. Raises DataError if it has no tokens or does not fit into a pack."""
    length = sum(segment.length for segment in segments)
    patches = sum(segment.patch_count for segment in segments)
    frames = sum(segment.frame_count for segment in segments)
    if length == 0:
        raise DataError(f"empty sample: {key} gives no tokens")
    if length > shape.length or patches > shape.patches:
        raise DataError(
            f"longer than pack: {key} has {length} tokens and {patches} patches, data.pack_length is "
            f"{shape.length} and data.pack_patches {shape.patches}"
        )
    if frames > shape.frames:
        raise DataError(
            f"longer than pack: {key} has recordings of {frames / FRAMES_A_SECOND:g} s for its tasks; raise "
            f"data.pack_speech_seconds above {frames / FRAMES_A_SECOND:g}"
        )
    return Encoded(ref, key, segments, length, patches, frames)


class Packer:
    """Best-fit packing in tokens, with even patches, within the frames of recordings. Depends on nothing but the order
    and sizes of the samples."""

    def __init__(self, shape: PackShape, lookahead: int) -> None:
        """At most `lookahead` samples are kept for later packs."""
        self._shape = shape
        self._lookahead = lookahead
        self.pending: list[Encoded] = []  # oldest first

    def fill(self, draw: Callable[[], Encoded | None]) -> list[Encoded]:
        """The samples of the next pack; [] when none is pending and `draw` returns None.

        The oldest pending sample always goes in, so none waits for ever. Then long samples follow, such that the pack
        has as many patches for its tokens as all that are pending: ranks wait for the pack with the most patches. At
        the end come the one or two that fill the pack best. While no sample fits, new ones are drawn, until `lookahead`
        are pending.
        """
        chosen: list[Encoded] = []
        aim = 0.0  # patches
        length, patches, frames = self._shape.length, self._shape.patches, self._shape.frames
        while length > (1 - _FULL) * self._shape.length and patches >= (1 - _FULL) * self._shape.patches:
            fitting = [
                item
                for item in self.pending
                if item.length <= length and item.patches <= patches and item.frames <= frames
            ]
            if fitting:
                if chosen:
                    taken = self._choice(fitting, length, patches, frames, aim - self._shape.patches + patches)
                else:
                    taken, aim = self.pending[:1], self._shape.length * self._patches_per_token()
                for item in taken:
                    self.pending.remove(item)
                    length -= item.length
                    patches -= item.patches
                    frames -= item.frames
                chosen += taken
            elif len(self.pending) < self._lookahead and (drawn := draw()) is not None:
                self.pending.append(drawn)
            else:
                break
        return chosen

    def _patches_per_token(self) -> float:
        return sum(item.patches for item in self.pending) / sum(item.length for item in self.pending)

    def _choice(self, fitting: list[Encoded], length: int, patches: int, frames: int, wanted: float) -> list[Encoded]:
        """The next sample, or the last two, of those that fit. `length` tokens, `patches` and `frames` are left in the
        pack, `wanted` patches to what it should have."""
        longest = max(fitting, key=lambda item: item.length)
        if len(fitting) >= self._lookahead // 2 and length <= _LAST * longest.length:
            pairs = (
                [one, other]
                for one, other in combinations(fitting, 2)
                if one.length + other.length <= length
                and one.patches + other.patches <= patches
                and one.frames + other.frames <= frames
            )
            return max([[longest], *pairs], key=lambda items: sum(item.length for item in items))
        density = (max(wanted, 0.0) / self._shape.patches) / (length / self._shape.length)  # as shares of a pack

        def worth(item: Encoded) -> float:
            share = item.length / self._shape.length
            return share - abs(item.patches / self._shape.patches - share * density)

        return [max(fitting, key=worth)]


def assemble(segments: Sequence[Segment], shape: PackShape, keys: Sequence[str] = ()) -> Pack:
    """Place `segments` one after another in a pack. Without segments it is padding without labels.

    `keys`: names of their samples.
    """
    length, cells = shape.length, shape.patches // shape.merge**2
    tokens = np.zeros(length, np.int64)
    labels = np.full(length, IGNORE, np.int64)
    positions = np.zeros(length, np.int64)
    places = np.zeros((length, 3), np.int64)
    task_ids = np.zeros(length, np.int64)
    modality_ids = np.full(length, Modality.TEXT, np.int64)
    patches: list[np.ndarray] = []
    patch_positions = np.zeros((shape.patches, 2), np.int64)
    cell_position = np.full(cells, length, np.int64)
    cell_frame = np.full(cells, length, np.int64)
    cell_time = np.full(cells, -1, np.float32)
    counts = dict.fromkeys(COUNTS, 0)
    picture_lengths: list[int] = []
    frame_tokens: list[int] = []
    ranked: list[np.ndarray] = []
    mel: list[np.ndarray] = []
    speech_position: list[np.ndarray] = [np.zeros(0, np.int64)]

    end = patch_end = cell_end = 0
    for segment in segments:
        start, end = end, end + segment.length
        tokens[start:end] = segment.tokens
        labels[start:end] = segment.labels
        positions[start:end] = np.arange(segment.length)
        places[start:end] = segment.places(shape.merge)
        task_ids[start:end] = segment.task
        modality_ids[start:end] = segment.modality
        for term in TASKS[segment.task].terms:
            counts[term.name] += _TARGETS[term.targets](segment)
        counts["labels"] += _TARGETS["labels"](segment)
        ranked.append(segment.ranked + len(frame_tokens))
        for picture in segment.pictures:
            count = len(picture.patches)
            patch_start, patch_end = patch_end, patch_end + count
            cell_start, cell_end = cell_end, cell_end + len(picture.cell_token)
            patches.append(picture.patches)
            patch_positions[patch_start:patch_end] = grid_positions(picture.grid, shape.merge)
            cell_position[cell_start:cell_end] = start + picture.cell_token
            cell_time[cell_start:cell_end] = picture.time_seconds
            if picture.frame_token >= 0:
                cell_frame[cell_start:cell_end] = start + picture.frame_token
                frame_tokens.append(start + picture.frame_token)
            picture_lengths.append(count)
        if segment.recording is not None:
            assert shape.speech is not None, "a recording for a model that does not hear"
            mel.append(segment.recording.mel)
            heard = len(segment.recording.mel) // shape.speech.cell
            speech_position.append(start + segment.recording.first + np.arange(heard))
    ends = np.cumsum([segment.length for segment in segments], dtype=np.int64)
    paired = [(int(n) - 1, s) for n, s in zip(ends, segments, strict=True) if s.pair >= 0]
    media = [(n, s.pair) for n, s in paired if s.pictures]
    text = [(n, s.pair) for n, s in paired if not s.pictures]
    assert [pair for _, pair in media] == [pair for _, pair in text], "a retrieval pair has lost one side"
    counts["tokens"] = end
    for modality, name in TOKENS_OF.items():
        counts[name] = int(np.count_nonzero(modality_ids[:end] == modality))
    return Pack(
        tokens=tokens,
        labels=labels,
        positions=positions,
        places=places,
        task_ids=task_ids,
        modality_ids=modality_ids,
        real=np.arange(length) < end,
        segment_lengths=[segment.length for segment in segments],
        patches=patches or [np.zeros((shape.merge**2, 3 * shape.patch_size**2), np.uint8)],
        patch_positions=patch_positions,
        picture_lengths=picture_lengths,
        cell_position=cell_position,
        cell_weight=_shares(cell_position, length),
        cell_time=cell_time,
        cell_frame=cell_frame,
        cell_frame_weight=_shares(cell_frame, length),
        mel=mel or _silence(shape),
        speech_position=np.concatenate(speech_position),
        media_embedding=np.array([n for n, _ in media], np.int64),
        text_embedding=np.array([n for n, _ in text], np.int64),
        pair_ids=np.array([pair for _, pair in media], np.int64),
        frame_tokens=np.array(frame_tokens, np.int64),
        importance=np.concatenate([np.zeros(0, np.float32), *(segment.importance for segment in segments)]),
        ranked=np.concatenate([np.zeros((0, 2), np.int64), *ranked]),
        counts=counts,
        keys=list(keys),
    )


def collate(packs: Sequence[Pack]) -> Batch:
    """Flatten packs of one shape into a batch, without their unused patches.

    If no pack has a picture, the patches of one cell stay, because the encoder runs on every rank at every step.
    """
    length = len(packs[0].tokens)
    cell_size = len(packs[0].patch_positions) // len(packs[0].cell_position)
    segments = [n for pack in packs for n in [*pack.segment_lengths, length - sum(pack.segment_lengths)] if n]
    pictures = [n for pack in packs for n in pack.picture_lengths] or [cell_size]
    used = [sum(pack.picture_lengths) for pack in packs]
    used[0] = used[0] if any(used) else cell_size
    patches = [part for pack, n in zip(packs, used, strict=True) if n for part in pack.patches]
    frames = np.cumsum([0, *(len(pack.frame_tokens) for pack in packs)])
    mel, heard, recordings = _speech(packs)
    counts = {name: sum(pack.counts[name] for pack in packs) for name in packs[0].counts}

    def placed(name: str) -> torch.Tensor:
        """Token indices of cells."""
        positions = [getattr(pack, name)[: n // cell_size] for pack, n in zip(packs, used, strict=True)]
        moved = [np.where(at < length, at + b * length, len(packs) * length) for b, at in enumerate(positions)]
        return torch.from_numpy(np.concatenate(moved))

    def listed(name: str, offsets: Sequence[int]) -> torch.Tensor:
        """Lists of different lengths, concatenated."""
        parts = [getattr(pack, name) + offset for pack, offset in zip(packs, offsets, strict=True)]
        return torch.from_numpy(np.concatenate(parts))

    starts, none = range(0, len(packs) * length, length), [0] * len(packs)

    def flat(name: str, unit: int = 0) -> torch.Tensor:
        """Values per token; with `unit`, values per `unit` patches, of the used patches."""
        cuts = [n // unit if unit else length for n in used]
        return torch.from_numpy(
            np.concatenate([getattr(pack, name)[:cut] for pack, cut in zip(packs, cuts, strict=True)])
        )

    return Batch(
        tokens=flat("tokens"),
        labels=flat("labels"),
        positions=flat("positions"),
        places=flat("places"),
        task_ids=flat("task_ids"),
        modality_ids=flat("modality_ids"),
        real=flat("real"),
        cu_segments=_cumulative(segments),
        max_segment=max(segments),
        patches=torch.from_numpy(np.concatenate(patches)),
        patch_positions=flat("patch_positions", 1),
        cu_pictures=_cumulative(pictures),
        max_picture=max(pictures),
        cell_position=placed("cell_position"),
        cell_weight=flat("cell_weight", cell_size),
        cell_time=flat("cell_time", cell_size),
        cell_frame=placed("cell_frame"),
        cell_frame_weight=flat("cell_frame_weight", cell_size),
        mel=torch.from_numpy(mel),
        cu_recordings=_cumulative(recordings),
        max_recording=max(recordings, default=0),
        speech_position=torch.from_numpy(heard),
        media_embedding=listed("media_embedding", starts),
        text_embedding=listed("text_embedding", starts),
        pair_ids=listed("pair_ids", none),
        frame_tokens=listed("frame_tokens", starts),
        importance=torch.from_numpy(np.concatenate([pack.importance for pack in packs])),
        ranked=listed("ranked", frames[:-1].tolist()),
        counts=counts,
        keys=[key for pack in packs for key in pack.keys],
        pairs_of_ranks=(sum(len(pack.pair_ids) for pack in packs),),
    )


@lru_cache(maxsize=4096)
def grid_positions(grid: tuple[int, int], merge: int) -> np.ndarray:
    """(row, column) of each patch of a picture, ordered as by `to_patches`: int64 [p, 2], read-only."""
    rows, columns = grid
    row, column = np.mgrid[:rows, :columns]
    place = np.stack([row, column], axis=-1).reshape(rows // merge, merge, columns // merge, merge, 2)
    positions = place.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    positions.setflags(write=False)
    return positions


def _shares(token_of_cell: np.ndarray, length: int) -> np.ndarray:
    """1 / (cells on the same token), and 0 for padding (`length`): float32 [Q]."""
    shares = (1.0 / np.bincount(token_of_cell, minlength=length + 1)[token_of_cell]).astype(np.float32)
    shares[token_of_cell == length] = 0
    return shares


def _silence(shape: PackShape) -> list[np.ndarray]:
    """What the speech encoder reads where nothing is spoken, because it runs on every rank at every step."""
    return [] if shape.speech is None else [np.zeros((shape.speech.cell, shape.speech.bands), np.float32)]


def _speech(packs: Sequence[Pack]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Log-mel frames [F, M] of all recordings, the token of each of their cells, and the states of each recording. If
    no pack has a recording, one cell of silence stays."""
    length, padding = len(packs[0].tokens), len(packs) * len(packs[0].tokens)
    spoken = [(b * length, pack) for b, pack in enumerate(packs) if len(pack.speech_position)]
    mel = [one for _, pack in spoken for one in pack.mel] or packs[0].mel
    if not mel:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int64), []
    heard = [pack.speech_position + start for start, pack in spoken] or [np.array([padding])]
    return np.concatenate(mel), np.concatenate(heard), [len(one) // FRAMES_OF_STATE for one in mel]


def _cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
