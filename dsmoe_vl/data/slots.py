"""Shared memory through which worker processes hand the patches of their packs to the rank.

Patches are nearly all of a pack's bytes. Through the pipe of a DataLoader they are copied six times, half of that by
the rank while it would launch kernels; here a worker copies them once, and `collate` reads them where they are.
"""

from __future__ import annotations

import math
import os
import weakref
from multiprocessing.heap import Arena

import numpy as np

from dsmoe_vl.data.pack import PackShape
from dsmoe_vl.data.segment import Pack


class PatchSlots:
    """A ring of slots for each worker: its pack number i lies in slot i % their count.

    A slot needs no lock, nor a message when the rank is done with it. A DataLoader asks a worker for a further pack
    only when the rank takes one, so with as many slots as packs that a worker may be ahead and the rank may hold, none
    is overwritten too early. That holds as long as no worker ends: torch would give its work to the others.

    Can be passed to worker processes, however they are started.
    """

    def __init__(self, workers: int, ahead: int, held: int, shape: PackShape) -> None:
        """`ahead`: packs of a worker that were asked for and not taken yet; `held`: those that the rank still reads."""
        self._count = ahead + held
        self._cell = shape.merge**2
        self._numbers_shape = (workers, self._count)
        self._patches_shape = (workers, self._count, shape.patches, 3 * shape.patch_size**2)
        self._offset = 8 * math.prod(self._numbers_shape)
        size = self._offset + math.prod(self._patches_shape)
        # Memory of its own: /dev/shm is small in containers, and a write beyond its end kills the process.
        handle = os.memfd_create("patches")
        os.ftruncate(handle, size)
        self._memory = Arena(size, handle)
        weakref.finalize(self._memory, os.close, handle)

    def store(self, pack: Pack, worker: int, number: int) -> None:
        """Move the patches of a worker's pack `number` into its slot; the pack keeps none."""
        slot = number % self._count
        self._numbers()[worker, slot] = number
        np.concatenate(pack.patches, out=self._patches()[worker, slot, : self._used(pack)])
        pack.patches = []

    def restore(self, pack: Pack, worker: int, number: int) -> None:
        """Give a pack that has arrived its patches, until `held` further ones of its worker have been taken."""
        pack.patches = [self._patches()[worker, number % self._count, : self._used(pack)]]

    def check(self, worker: int, number: int) -> None:
        """To be called when a pack's patches have been read: they were its own all the time."""
        found = self._numbers()[worker, number % self._count]
        assert found == number, f"pack {number} of worker {worker} was overwritten by its pack {found}"

    def _used(self, pack: Pack) -> int:
        return sum(pack.picture_lengths) or self._cell

    def _numbers(self) -> np.ndarray:
        count = math.prod(self._numbers_shape)
        return np.frombuffer(self._memory.buffer, np.int64, count).reshape(self._numbers_shape)

    def _patches(self) -> np.ndarray:
        return np.frombuffer(self._memory.buffer, np.uint8, offset=self._offset).reshape(self._patches_shape)
