"""Tensors in safetensors files: written piece by piece and hashed on the way, read by ranges.

The library's own writer first makes a copy of everything in memory, and its reader maps pages one by one. The format:
the length of the header as 8 bytes, the header as JSON (type, shape and place of each tensor), then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from safetensors import safe_open
from torch import Tensor

_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK = 1 << 22  # bytes: what is checked, hashed and written of it stays in the processor's cache
_BEHIND = 1 << 26  # bytes of a file that the system may keep in memory before it writes them to the disk


def type_named(name: str) -> torch.dtype:
    """The dtype of a name in a file's header, such as "BF16". Raises KeyError for one that is not written here."""
    return {name: dtype for dtype, name in _TYPES.items()}[name]


class FileEntry(NamedTuple):
    """What a manifest knows of a file: bytes, and the BLAKE3 of its content as hex digits, several times as fast as
    SHA-256."""

    size: int
    blake3: str


class Spec(NamedTuple):
    """Type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Share(NamedTuple):
    """What goes into one file: the tensors' specs, and what this rank has of the tensors. `assemble` makes these of it,
    one by one and in the same order; it may be a collective."""

    specs: dict[str, Spec]
    parts: Iterable[Tensor]
    assemble: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Share:
        """Tensors that are there."""
        specs = {name: Spec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}
        return cls(specs, tensors.values())

    @property
    def tensors(self) -> Iterable[Tensor]:
        """The tensors."""
        return self.assemble(self.parts)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.size for spec in self.specs.values())

    def kept(self) -> Share:
        """With copies on the CPU, each freed when the next one is taken."""
        return self._replace(parts=_released([value.to("cpu", copy=True) for value in self.parts]))


def _released(tensors: list[Tensor]) -> Iterator[Tensor]:
    left = deque(tensors)
    tensors.clear()
    while left:
        yield left.popleft()


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
    broken: str | None = None
    specs, tensors = iter(share.specs.items()), iter(share.tensors)
    try:
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, "checkpoint_file") as thread:
            out = _Hashed(file, thread)

            def put_values(tensor: Tensor) -> None:
                nonlocal broken
                name, spec = next(specs)
                assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name} is not as announced"
                flat = tensor.detach().to("cpu").contiguous().view(-1)
                for part in flat.split(_CHUNK // flat.itemsize) if len(flat) else ():
                    if broken is None and not _is_finite(part):
                        broken = name
                    out.put(part.view(torch.uint8).numpy().data)

            out.put(len(encoded).to_bytes(8, "little"))
            out.put(encoded)
            for tensor in tensors:
                put_values(tensor)
                del tensor  # or it would be in memory while the next one is made
            return Written(out.end(), broken)
    except Exception:
        for _ in tensors:
            pass
        raise


class _Hashed:
    """A new file that is hashed while a thread writes it, one chunk behind."""

    def __init__(self, file: FileIO, thread: ThreadPoolExecutor) -> None:
        self._file, self._thread, self._digest, self._size = file, thread, blake3(), 0
        self._behind: Future[None] = thread.submit(lambda: None)

    def put(self, data: Any) -> None:
        """Add bytes. Raises OSError, of these or of those before."""
        before, self._behind = self._behind, self._thread.submit(_write_all, self._file, data)
        self._digest.update(data)
        before.result()
        if (self._size + len(data)) // _BEHIND > self._size // _BEHIND:
            _send_to_disk(self._file, self._size)
        self._size += len(data)

    def end(self) -> FileEntry:
        """Wait until all is on disk. Raises OSError."""
        self._behind.result()
        os.fsync(self._file.fileno())
        return FileEntry(self._size, self._digest.hexdigest())


def _write_all(file: FileIO, data: Any) -> None:
    while data:
        data = memoryview(data)[file.write(data) :]


def _send_to_disk(file: FileIO, size: int) -> None:
    """Begin to write the first `size` bytes to the disk, and drop them from the page cache: a checkpoint is rarely read
    soon, and shards and the copies want that memory. Where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)


def is_finite(values: Tensor) -> bool:
    """Whether all are; contiguous values are checked in parts, without a copy of their size."""
    return all(_is_finite(part) for part in values.view(-1).split(_CHUNK))


def _is_finite(values: Tensor) -> bool:
    """A sum that is finite says so in one pass; one that is not may have overflown."""
    return not values.is_floating_point() or bool(values.sum().isfinite()) or bool(values.isfinite().all())


def file_entry(path: Path) -> FileEntry:
    """Of a file that is there. Raises OSError."""
    digest, size = blake3(), 0
    chunk = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            size += count
    return FileEntry(size, digest.hexdigest())


class _Place(NamedTuple):
    """Of a tensor in a file: the name of its type, its shape, and bytes from the beginning."""

    type_name: str
    shape: tuple[int, ...]
    begin: int


class TensorFiles:
    """Open files of one folder; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._places: dict[str, dict[str, _Place]] = {}

    def file(self, name: str) -> Any:
        """An open safetensors file. Raises SafetensorError, OSError."""
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self._open[name]

    def keys(self, name: str) -> frozenset[str]:
        """The tensors of a file."""
        return frozenset(self._of(name))

    def spec(self, file: str, tensor: str) -> Spec:
        """Type and shape of a tensor. Raises KeyError for a type that is not written here."""
        place = self._of(file)[tensor]
        return Spec(type_named(place.type_name), place.shape)

    def flat(self, file: str, tensor: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of a tensor, flattened."""
        found = torch.empty(stop - start, dtype=self.spec(file, tensor).dtype)
        self.fill(file, tensor, start, found)
        return found

    def fill(self, file: str, tensor: str, start: int, into: Tensor) -> None:
        """Fill `into` [number of elements], of any type and on any device, with the elements from `start` on.

        Raises SafetensorError, OSError; ValueError for elements that the tensor does not have, EOFError for a file that
        was cut short meanwhile.
        """
        spec, begin = self.spec(file, tensor), self._of(file)[tensor].begin
        size, count = spec.dtype.itemsize, math.prod(spec.shape)
        if not 0 <= start <= start + len(into) <= count:
            raise ValueError(f"{tensor} has {count} elements, asked for are {start} to {start + len(into)}")
        with (self.folder / file).open("rb", buffering=0) as opened:
            opened.seek(begin + start * size)
            if into.dtype == spec.dtype and into.device.type == "cpu" and into.is_contiguous():
                _fill(opened, into)
                return
            room = torch.empty(min(len(into), _CHUNK // size), dtype=spec.dtype)
            for part in into.split(max(len(room), 1)):
                _fill(opened, room[: len(part)])
                part.copy_(room[: len(part)])

    def _of(self, name: str) -> dict[str, _Place]:
        """The tensors of a file. The library has checked its header."""
        if name not in self._places:
            self.file(name)
            with (self.folder / name).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._places[name] = {
                tensor: _Place(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for tensor, entry in header.items()
            }
        return self._places[name]


def _fill(file: FileIO, into: Tensor) -> None:
    left = memoryview(into.view(torch.uint8).numpy().data) if into.numel() else memoryview(b"")
    while left:
        count = file.readinto(left)
        if not count:
            raise EOFError(f"{file.name} ends too early")
        left = left[count:]
