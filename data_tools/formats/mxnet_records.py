"""MXNet's RecordIO: the records of a .rec file, their keys in a .idx file, their paths in a .lst file.

A .rec file is a row of parts. A part is a magic number, a word with its kind (3 bits) and size (29 bits), its bytes,
and zeros up to a multiple of four. A record is one part, or several: where its bytes have the magic number at a
multiple of four they are cut, and the number is left out. So it stands only where a part begins, and behind damage the
next record is found again. A record begins with a header: number of labels, label, two ids, and the labels if there
are several.
"""

from __future__ import annotations

import math
import os
import posixpath
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_tools.formats import Stored
from data_tools.formats.tables import read_text
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

MAGIC = 0xCED7230A.to_bytes(4, "little")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)  # kinds of parts
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")  # number of labels, or 0 for the one label that follows; two ids
_CHUNK = 2**20  # bytes searched at a time
_MOST_PARTS = 2**16  # of a record; even in noise of half a gigabyte the number occurs once in 32 times
_MOST_LABELS = 2**18

Span = tuple[int, int]  # place of the bytes of a part in the file, and their number


@dataclass(frozen=True)
class Payload(Stored):
    """What a record has behind its header and labels, `skipped` bytes. `parts`: where its bytes are, without the magic
    numbers between them. `offset` is the record's."""

    parts: tuple[Span, ...] = ()
    skipped: int = 0

    def __str__(self) -> str:
        return f"{self.path}, byte {self.offset}"

    def read_bytes(self, most: int | None = None) -> bytes:
        """See `Stored`. Raises OSError also if a part runs into the next one, because its size is wrong."""
        end = self.skipped + (self.size if most is None else min(self.size, most))
        with self.path.open("rb") as file:
            return _joined(file, self.parts, end)[self.skipped :]


class _DamageError(OSError):
    """What is wrong with a record."""


class Entry(NamedTuple):
    """A record: its place, the first of its ids, its labels, and its payload; or None, and the `problem` with it."""

    offset: int
    number: int
    labels: tuple[float | None, ...]
    payload: Payload | None
    problem: str = ""


class Listed(NamedTuple):
    """A line of a .lst file: the path, and what stands between it and the index and is no number."""

    file: str
    texts: list[str]


def read_records(path: Path, known: Container[int] = ()) -> Iterator[Entry]:
    """The records in order. Of the payloads nothing is read. What is damaged is one entry with a problem, up to where
    the next record begins. `known`: places of records, by an index; one that ends where a damaged one begins is then
    not taken for damaged itself. Raises DataError if the file cannot be read or is another one."""
    try:
        with require_regular(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != MAGIC:
                raise DataError(
                    f"--rec {path}: byte 0 is not the beginning of a record: give a .rec file of MXNet's im2rec"
                )
            position = 0
            while position < size:
                try:
                    parts, end = _parts(file, position, size, known)
                    yield _entry(file, path, position, parts)
                except _DamageError as error:
                    yield Entry(position, 0, (), None, f"damaged record: {path}, byte {position}: {error}")
                    end = _next_record(file, position + 4, size)
                position = end
    except OSError as error:
        raise DataError(f"--rec {path}: {error.strerror}") from error


def read_index(path: Path) -> dict[int, str]:
    """The keys of a .idx file by the place of their record: lines of a key, a tab and a place. Raises DataError."""
    keys: dict[int, str] = {}
    for line, text in enumerate(read_text(path, "index").split("\n"), 1):
        if not text.strip():
            continue
        key, _, place = (part.strip() for part in text.partition("\t"))
        if not key or not (place.isascii() and place.isdigit() and len(place) < 19):
            raise DataError(
                f"index {path}, line {line}: {text[:80]!r} is not a key, a tab and a place in bytes: write the file "
                "again with MXNet's rec2idx, or remove it to take the ids in the records"
            )
        if int(place) in keys:
            raise DataError(
                f"index {path}, line {line}: {keys[int(place)]!r} and {key!r} are both at byte {place}: write the file "
                "again with MXNet's rec2idx"
            )
        keys[int(place)] = _plain(key)
    return keys


def read_list(path: Path) -> dict[str, Listed]:
    """The lines of a .lst file by their index. Raises DataError."""
    listed: dict[str, Listed] = {}
    for line, text in enumerate(read_text(path, "list").split("\n"), 1):
        if not text.strip():
            continue
        index, *labels = (cell.strip() for cell in text.split("\t"))
        if not (index.isascii() and index.isdigit()) or not labels or not labels[-1]:
            raise DataError(
                f"list {path}, line {line}: {text[:80]!r} is not an index, labels and a path with tabs between: write "
                "it as im2rec --list does, or remove the file if captions are named by index"
            )
        index = _plain(index)
        if index in listed:
            raise DataError(f"list {path}, line {line}: the index {index} occurs twice: each record needs its own")
        texts = [label for label in labels[:-1] if label and not _is_number(label)]
        listed[index] = Listed(posixpath.normpath(labels[-1]), texts)
    return listed


def _parts(file: BinaryIO, start: int, size: int, known: Container[int]) -> tuple[tuple[Span, ...], int]:
    """The parts of the record at `start`, and where the next one begins. Raises _DamageError."""
    found: list[Span] = []
    position = start
    while True:
        kind, length = _part(file, position, size)
        if (kind in (_WHOLE, _FIRST)) == bool(found) or len(found) == _MOST_PARTS:
            raise _DamageError("its end is missing" if found else "its beginning is missing")
        found.append((position + _PART.size, length))
        position += _PART.size + length + -length % 4
        if kind in (_WHOLE, _LAST):
            break
    if position < size and position not in known and os.pread(file.fileno(), 4, position) != MAGIC:
        raise _DamageError(f"no record begins at byte {position}, where its size says that it ends")
    return tuple(found), position


def _part(file: BinaryIO, position: int, size: int) -> Span:
    """Kind and length of the part at `position`."""
    head = os.pread(file.fileno(), _PART.size, position)
    if len(head) < _PART.size:
        raise _DamageError(f"the file ends in its header, at byte {size}")
    if head[:4] != MAGIC:
        raise _DamageError(f"no magic number at byte {position}")
    kind, length = _PART.unpack(head)[1] >> 29, _PART.unpack(head)[1] & (2**29 - 1)
    if kind > _LAST:
        raise _DamageError(f"a part of the unknown kind {kind} at byte {position}")
    if position + _PART.size + length > size:
        raise _DamageError(f"{length} bytes of it are announced at byte {position}, and the file ends at byte {size}")
    return kind, length


def _entry(file: BinaryIO, path: Path, offset: int, parts: tuple[Span, ...]) -> Entry:
    total = sum(length for _, length in parts) + 4 * (len(parts) - 1)
    head = _joined(file, parts, min(total, _HEADER.size))
    if len(head) < _HEADER.size:
        raise _DamageError(f"it has {total} bytes, and the header of an image has {_HEADER.size}")
    count, label, number, _ = _HEADER.unpack(head)
    skipped = _HEADER.size + 4 * count
    if count > _MOST_LABELS or skipped > total:
        raise _DamageError(f"its header announces {count} labels, and the record has {total} bytes")
    labels = (label,)
    if count:
        labels = struct.unpack(f"<{count}f", _joined(file, parts, skipped)[_HEADER.size :])
    payload = Payload(path, offset, total - skipped, f"{path.name} byte {offset}", parts, skipped)
    # JSON has neither NaN nor infinity.
    return Entry(offset, number, tuple(one if math.isfinite(one) else None for one in labels), payload)


def _joined(file: BinaryIO, parts: tuple[Span, ...], end: int) -> bytes:
    """The first `end` bytes of a record. Raises _DamageError if they are not those of one record."""
    data = bytearray()
    for number, (offset, length) in enumerate(parts):
        if number:
            data += MAGIC
        if len(data) >= end:
            break
        file.seek(offset)
        wanted = min(length, end - len(data))
        part = file.read(wanted)
        if len(part) < wanted:
            raise _DamageError("the file has become shorter")
        if _magic_in(part, 0) >= 0:
            raise _DamageError(f"another record begins at byte {offset + _magic_in(part, 0)} in it")
        data += part
    return bytes(data[:end])


def _next_record(file: BinaryIO, position: int, size: int) -> int:
    """The place of the first record at or after `position`, a multiple of four; `size` if there is none."""
    while position < size:
        chunk = os.pread(file.fileno(), _CHUNK, position)
        place = _magic_in(chunk, 0)
        while place >= 0:
            word = os.pread(file.fileno(), 4, position + place + 4)
            if int.from_bytes(word, "little") >> 29 in (_WHOLE, _FIRST):
                return position + place
            place = _magic_in(chunk, place + 4)
        position += _CHUNK
    return size


def _magic_in(data: bytes, start: int) -> int:
    """The first multiple of four from `start` on at which the magic number stands; -1 without any."""
    place = data.find(MAGIC, start)
    while place >= 0 and place % 4:
        place = data.find(MAGIC, place + 1)
    return place


def _plain(key: str) -> str:
    """A whole number without leading zeros, as MXNet compares keys; other keys as they are."""
    return key.lstrip("0") or "0" if key.isascii() and key.isdigit() else key


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
