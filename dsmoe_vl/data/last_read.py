"""Which sample each worker of a rank began last, in shared memory: what to name if a worker stops."""

from __future__ import annotations

import ctypes
import multiprocessing
from typing import Any

from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.data.stream import SampleRef
from dsmoe_vl.files import sharing

_KEY_BYTES = 200  # of a longer key, the beginning


class _Row(ctypes.Structure):
    _fields_ = (
        ("begun", ctypes.c_bool),
        ("source", ctypes.c_int64),
        ("shard", ctypes.c_int64),
        ("sample", ctypes.c_int64),
        ("key", ctypes.c_char * _KEY_BYTES),
    )


class LastRead:
    """A row for each worker, which the worker alone writes. It needs no lock: what is read once a worker has stopped
    does not change any more. Can be passed to worker processes under every start method.
    """

    def __init__(self, workers: int, indexes: list[ShardIndex]) -> None:
        """`indexes`: of the sources, in the order of `SampleRef.source`."""
        with sharing("the data workers"):
            self._rows: Any = multiprocessing.RawArray(_Row, workers)
        self._indexes = indexes

    def begin(self, worker: int, ref: SampleRef) -> None:
        """Called before the sample is read."""
        row = self._rows[worker]
        row.key = b""
        row.source, row.shard, row.sample, row.begun = ref.source, ref.shard, ref.sample, True

    def found(self, worker: int, key: str) -> None:
        """Called when the sample is read, before it is decoded."""
        self._rows[worker].key = key.encode(errors="replace")[:_KEY_BYTES]

    def describe(self, worker: int) -> str:
        """ "sample 17 of images-000000.tar, KEY"; without the key if it had not been read yet; "" before the first."""
        row = self._rows[worker]
        if not row.begun:
            return ""
        shard = self._indexes[row.source].shards[row.shard].name
        key = row.key.decode(errors="replace")
        return f"sample {row.sample} of {shard}" + (f", {key}" if key else "")
