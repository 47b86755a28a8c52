"""The trained tensors on disk, of a checkpoint or an exported model: the one place that knows their files.

model-00001-of-00002.safetensors ...   each rank's share
model.safetensors.index.json           the file of each tensor, as Hugging Face's tools read it

Tensors have their names in the one-process model, but each expert is a tensor of its own: `experts.w1` [E, ...] is
stored as `experts.0.w1` and so on. The tied output projection is stored once, as the embedding. No DeepSpeed, any
topology.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dsmoe_vl.checkpoint.tensor_files import FileEntry, Share, Spec, TensorFiles, write_tensors
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.files import write_json
from dsmoe_vl.moe.expert_names import expert_name, is_of_experts

# Names as Hugging Face's tools have them: of all weights in one file, and of an index of several.
SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w[123](?:_lora_[ab])?)")


def shard_name(rank: int, ranks: int) -> str:
    """The file of a rank's share."""
    return f"model-{rank + 1:05d}-of-{ranks:05d}.safetensors"


@dataclass(frozen=True)
class WeightsFile:
    """The tensors in one folder. Reading raises SafetensorError for a damaged file, OSError for a missing one."""

    folder: Path

    @property
    def path(self) -> Path:
        """The index, for messages."""
        return self.folder / INDEX_NAME

    @cached_property
    def places(self) -> dict[str, str]:
        """The file of each stored tensor. Raises CheckpointError for an index that is none."""
        try:
            found = json.loads(self.path.read_text())["weight_map"]
            assert all(isinstance(file, str) and Path(file).name == file for file in found.values())
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise CheckpointError(
                f"{self.path} is not an index of weights: {error}. Name another checkpoint."
            ) from None
        return dict(found)

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self.folder)

    @cached_property
    def _experts(self) -> dict[str, list[int]]:
        """The numbers of the stored experts of each stacked tensor, ascending."""
        numbers: dict[str, list[int]] = {}
        for name in self.places:
            if match := _EXPERT.fullmatch(name):
                numbers.setdefault(f"{match[1]}.{match[3]}", []).append(int(match[2]))
        return {name: sorted(found) for name, found in numbers.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum((self.folder / file).stat().st_size for file in set(self.places.values()))

    def shapes(self) -> dict[str, list[int]]:
        """The shape of every tensor of the one-process model, without reading the tensors."""
        found = {name: self._shape(name) for name in self.places if not _EXPERT.fullmatch(name)}
        for name, numbers in self._experts.items():
            found[name] = [len(numbers), *self._shape(expert_name(name, numbers[0]))]
        return found

    def _shape(self, stored: str) -> list[int]:
        return list(self.spec(stored).shape)

    def spec(self, stored: str) -> Spec:
        """Type and shape of a stored tensor, without reading it."""
        return self._files.spec(self.places[stored], stored)

    def read(self, stored: str) -> Tensor:
        """A stored tensor."""
        tensor: Tensor = self._files.file(self.places[stored]).get_tensor(stored)
        return tensor

    def load(self, device: str = "cpu") -> dict[str, Tensor]:
        """All tensors of the one-process model, on `device`."""
        found = {name: self.read(name).to(device) for name in self.places if not _EXPERT.fullmatch(name)}
        for name, numbers in self._experts.items():
            found[name] = torch.stack([self.read(expert_name(name, number)).to(device) for number in numbers])
        return found

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a tensor of the one-process model, flattened."""
        stored = self._experts.get(name, [])
        one = expert_name(name, stored[0]) if stored else name
        found = torch.empty(stop - start, dtype=self._files.spec(self.places[one], one).dtype)
        self.fill(name, start, found)
        return found

    def fill(self, name: str, start: int, into: Tensor) -> None:
        """Fill `into` [number of elements] with those of a tensor of the one-process model, from `start` on."""
        if name not in self._experts:
            self._files.fill(self.places[name], name, start, into)
            return
        size = math.prod(self._shape(expert_name(name, 0)))
        at, stop = start, start + len(into)
        while at < stop:
            number = at // size
            stored, end = expert_name(name, number), min(stop, (number + 1) * size)
            self._files.fill(self.places[stored], stored, at - number * size, into[at - start : end - start])
            at = end

    def chunks(self) -> Iterator[bytes]:
        """Names and bytes of all tensors, to hash them: the same whichever files they are in."""
        for stored in sorted(self.places):
            yield stored.encode()
            yield self.read(stored).contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    def save(self, weights: Mapping[str, Tensor]) -> dict[str, FileEntry]:
        """Write the tensors of a whole one-process model, which lie on the CPU, in one file and an index."""
        stored = dict(split_experts(weights))
        name = shard_name(0, 1)
        entry = write_tensors(self.folder / name, Share.of(stored)).entry
        self.write_index(dict.fromkeys(stored, name), {name: entry})
        return {name: entry}

    def write_index(self, places: Mapping[str, str], files: Mapping[str, FileEntry]) -> None:
        """Write the index, from the file of each stored tensor."""
        total = sum(entry.size for entry in files.values())
        write_json(self.path, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def split_experts(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors as they are stored. Where a layer has `experts.kept`, its rows are the experts of those numbers."""
    for name, value in weights.items():
        if not is_of_experts(name) or len(value) == 0:  # of no expert: the empty tensor says the shape
            yield name, value
            continue
        kept = weights.get(name.rpartition(".")[0] + ".kept")
        numbers = range(len(value)) if kept is None else kept.tolist()
        for number, row in zip(numbers, value, strict=True):
            yield expert_name(name, number), row
