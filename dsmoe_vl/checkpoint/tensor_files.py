"""Tensors in safetensors files: written piece by piece and hashed on the way, read by ranges.

The library's own writer first makes a copy of everything in memory. The format: the length of the header as 8 bytes,
the header as JSON (type, shape and place of each tensor), then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK = 1 << 24  # bytes


def type_named(name: str) -> torch.dtype:
    """The dtype of a name in a file's header, such as "BF16". Raises KeyError for one that is not written here."""
    return {name: dtype for dtype, name in _TYPES.items()}[name]


class FileEntry(NamedTuple):
    """What a manifest knows of a file: bytes and hex sha256."""

    size: int
    sha256: str


class Spec(NamedTuple):
    """Type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Share(NamedTuple):
    """What goes into one file: the tensors' specs, and the tensors in the same order, made one by one."""

    specs: dict[str, Spec]
    tensors: Iterable[Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Share:
        """Tensors that are there."""
        specs = {name: Spec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
        return cls(specs, tensors.values())

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.size for spec in self.specs.values())

    def kept(self) -> Share:
        """Copies of the tensors, on the CPU."""
        return Share(self.specs, [value.to("cpu", copy=True) for value in self.tensors])


class Written(NamedTuple):
    """A file's entry, and the first tensor with a value that is not finite."""

    entry: FileEntry
    broken: str | None


def write_tensors(path: Path, share: Share, metadata: Mapping[str, str] | None = None) -> Written:
    """Write a new file, and wait until it is on disk. `metadata`: what its header says of the whole file.

    Raises OSError, but makes all tensors also then: making one may be a collective.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, spec in share.specs.items():
        span = [place, place + spec.size]
        header[name] = {"dtype": _TYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        place += spec.size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest, written, broken = hashlib.sha256(), 0, None
    names, tensors = iter(share.specs.items()), iter(share.tensors)
    try:
        with path.open("wb") as file:

            def put(data: Any) -> None:
                nonlocal written
                file.write(data)
                digest.update(data)
                written += len(data)

            put(len(encoded).to_bytes(8, "little"))
            put(encoded)
            for tensor in tensors:
                name, spec = next(names)
                assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name} is not as announced"
                value = tensor.detach().to("cpu").contiguous()
                if broken is None and value.is_floating_point() and not value.isfinite().all():
                    broken = name
                if value.numel():
                    data: Any = value.view(-1).view(torch.uint8).numpy().data
                    for at in range(0, len(data), _CHUNK):
                        put(data[at : at + _CHUNK])
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        for _ in tensors:
            pass
        raise
    return Written(FileEntry(written, digest.hexdigest()), broken)


def file_entry(path: Path) -> FileEntry:
    """Of a file that is there. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


class TensorFiles:
    """Open files of one folder; tensors are mapped, not read, until they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._keys: dict[str, frozenset[str]] = {}

    def file(self, name: str) -> Any:
        """An open safetensors file. Raises SafetensorError, OSError."""
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self._open[name]

    def keys(self, name: str) -> frozenset[str]:
        """The tensors of a file."""
        if name not in self._keys:
            self._keys[name] = frozenset(self.file(name).keys())
        return self._keys[name]

    def flat(self, file: str, tensor: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a tensor, flattened: reads the rows that they are in."""
        view = self.file(file).get_slice(tensor)
        shape = view.get_shape()
        if not shape:
            return self.file(file).get_tensor(tensor).view(-1)[start:stop]
        row = math.prod(shape[1:])
        first = start // row
        rows = view[first : -(-stop // row)].reshape(-1)
        return rows[start - first * row : stop - first * row]
