"""The optimizer's state on disk: what each rank kept, and an index of it by the one-process model's tensors.

optimizer-00001-of-00002.safetensors ...   fp32 pieces of one rank: KIND/TENSOR/START
optimizer.index.json                       the pieces of each tensor, with its number of updates

KIND is master, exp_avg or exp_avg_sq. Ranks cut tensors where their memory ends; whoever reads takes the elements that
it needs from the pieces that have them. In fp32 there are no masters: the weights are the same numbers. Frozen tensors
have no pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dsmoe_vl.checkpoint.optimizer_state import MASTER, MOMENTS, Range, own_share, ranges
from dsmoe_vl.checkpoint.tensor_files import TensorFiles
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.files import write_json

INDEX_NAME = "optimizer.index.json"


class Piece(NamedTuple):
    """Elements `start` to `stop` of the tensor `name`, flattened, whose moments have seen so many `updates`."""

    name: str
    start: int
    stop: int
    updates: int


def optimizer_name(rank: int, ranks: int) -> str:
    """The file of a rank's pieces."""
    return f"optimizer-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def own_pieces(engine: Any, masters: bool) -> tuple[list[Piece], dict[str, Tensor]]:
    """This rank's pieces, and views of what they have. `masters`: with fp32 weights."""
    pieces: list[Piece] = []
    tensors: dict[str, Tensor] = {}
    for found in ranges(engine):
        share = own_share(found)
        if share.start < share.stop:
            pieces.append(Piece(share.name, share.start, share.stop, share.updates))
            wanted = {kind: value for kind, value in share.values.items() if masters or kind != MASTER}
            tensors |= {_key(kind, share.name, share.start): value for kind, value in wanted.items()}
    return pieces, tensors


def write_index(folder: Path, pieces_of_files: Mapping[str, Iterable[Piece]]) -> None:
    """Write the index. Raises OSError."""
    places: dict[str, list[tuple[str, int, int, int]]] = {}
    for file, pieces in pieces_of_files.items():
        for piece in pieces:
            places.setdefault(piece.name, []).append((file, *piece[1:]))
    write_json(folder / INDEX_NAME, places)


class OptimizerFiles:
    """The pieces in one folder. Raises CheckpointError for an index that is none, SafetensorError, OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files, self._weights = TensorFiles(folder), WeightsFile(folder)
        try:
            raw = json.loads((folder / INDEX_NAME).read_text())
            self._places = {
                name: sorted((Piece(Path(file).name, *numbers) for file, *numbers in places), key=lambda p: p.start)
                for name, places in raw.items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / INDEX_NAME} is no index of an optimizer's state: {error}. Remove {folder}."
            ) from None

    @property
    def updates(self) -> dict[str, int]:
        """How many updates the moments of each tensor have seen; of those that were not frozen."""
        return {name: places[0].updates for name, places in self._places.items()}

    def fill(self, found: Range) -> None:
        """Read into the views of a range. Without moments in the files, those of the range stay as they are; a tensor
        that was frozen has none."""
        for kind, value in found.values.items():
            self._read(kind, found.name, found.start, found.stop, value)

    def _read(self, kind: str, name: str, start: int, stop: int, into: Tensor) -> None:
        if name not in self._places:
            if kind == MASTER:
                into.copy_(self._weights.flat(name, start, stop))
            return
        at = start
        for file, begin, end, _ in self._overlapping(name, start, stop):
            key = _key(kind, name, begin)
            first, last = max(begin, start), min(end, stop)
            if first != at:
                break
            if key in self._files.keys(file):
                self._files.fill(file, key, first - begin, into[first - start : last - start])
            elif kind == MASTER:
                self._weights.fill(name, first, into[first - start : last - start])
            at = last
        if at != stop:
            raise CheckpointError(
                f"{self.folder} lacks elements {at} to {stop} of {name} in the optimizer's state: remove the folder to "
                "resume an older checkpoint"
            )

    def _overlapping(self, name: str, start: int, stop: int) -> Iterator[Piece]:
        """The pieces that have elements of a range; `name` is their file."""
        for piece in self._places.get(name, ()):
            if piece.start < stop and piece.stop > start:
                yield piece


def _key(kind: str, name: str, start: int) -> str:
    assert kind in (MASTER, *MOMENTS)
    return f"{kind}/{name}/{start}"
