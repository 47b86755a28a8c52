"""The trained tensors on disk, of a checkpoint or an exported model: the one place that knows their files.

Tensors have their names in the one-process model; the tied output projection is stored once, as the embedding. No
DeepSpeed, any topology.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = "model.safetensors"
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class WeightsFile:
    """The tensors in one folder. Reading raises SafetensorError for a damaged file, OSError for a missing one."""

    folder: Path

    @property
    def path(self) -> Path:
        """The file, for messages."""
        return self.folder / _NAME

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    def shapes(self) -> dict[str, list[int]]:
        """The shape of every tensor, without reading the tensors."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict

    def load(self, device: str = "cpu") -> dict[str, Tensor]:
        """All tensors on `device`."""
        return load_file(self.path, device=device)

    def save(self, weights: dict[str, Tensor]) -> None:
        """Write the tensors, which lie on the CPU and are contiguous."""
        save_file(weights, self.path)

    def chunks(self) -> Iterator[bytes]:
        """The content piece by piece, to hash it."""
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
