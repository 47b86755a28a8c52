"""The records of a conversion on disk, a file for each part, so that no process has all of them in memory."""

from __future__ import annotations

import hashlib
import pickle
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.formats import Record
from data_tools.writer import sample_key
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import writing


class Listed(NamedTuple):
    """What was written: the number of records, and the hash of all annotations."""

    size: int
    fingerprint: str


class RecordFiles:
    """`FOLDER/000000.pickle`, ...: lists of at most `per_file` records.

    A command reads only files that it has written itself, as it does with what its processes send each other: so they
    are pickles, which keep any value of the annotations.
    """

    def __init__(self, folder: Path, per_file: int) -> None:
        self.folder, self.per_file = folder, per_file

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"{number:06d}.pickle"

    def write(self, records: Iterable[Record]) -> Listed:
        """Write all. Keeps 8 bytes a record in memory, to know its key again.

        Raises DataError if two records would have the same key, and what reading the annotations raises.
        """
        digest, hashes, left = hashlib.sha256(), array("Q"), iter(records)
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while part := list(islice(left, self.per_file)):
            for record in part:
                digest.update(repr(record).encode("utf-8", "replace"))
                hashes.append(_hash(sample_key(record.identifier)))
            with writing(self.path(number)):
                self.path(number).write_bytes(pickle.dumps(part))
            number += 1
        self._check_keys(hashes)
        return Listed(len(hashes), digest.hexdigest())

    def _all(self) -> Iterator[Record]:
        for path in sorted(self.folder.iterdir()):
            yield from read_records(path)

    def _check_keys(self, hashes: array[int]) -> None:
        values = np.frombuffer(hashes, dtype=np.uint64)  # no copy
        values.sort()
        suspects = set(values[1:][values[1:] == values[:-1]].tolist())
        if not suspects:
            return
        owners: dict[str, tuple[int, Record]] = {}
        for number, record in enumerate(self._all()):
            key = sample_key(record.identifier)
            if _hash(key) in suspects and (owner := owners.setdefault(key, (number, record)))[0] != number:
                places = f"{_place(*owner)} and {_place(number, record)}"
                raise DataError(f"two records have the key {key!r} ({places}): identifiers must be unique")


def read_records(path: Path) -> list[Record]:
    """The records of a part, from a file that this command has written."""
    found: list[Record] = pickle.loads(path.read_bytes())
    return found


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _place(number: int, record: Record) -> str:
    media = getattr(record.media or record.recording, "name", "without media")
    return f"number {number + 1}, {media}, with identifier {record.identifier!r}"
